"""AdamW, as an objective wants it, and its step."""

from typing import Any

import torch
from torch import nn

from specforge_exp.config import Config
from specforge_exp.training.objective import Objective


def make_optimizer(cfg: Config, draft: nn.Module, objective: Objective) -> torch.optim.Optimizer:
    """AdamW, as the objective wants it."""
    decay, weights = cfg.trainer.weight_decay, list(draft.parameters())
    spared = [] if objective.decays_all else [weight for weight in weights if weight.dim() < 2]
    decayed = [weight for weight in weights if objective.decays_all or weight.dim() >= 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.lr, betas=objective.betas, weight_decay=decay, fused=True,
    )  # fmt: skip


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Update the weights and clear the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
