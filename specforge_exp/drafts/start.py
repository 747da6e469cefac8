"""What a draft takes over from its target: weights to start from."""

from typing import Any

import torch
from torch import Tensor, nn

from specforge_exp.target import Target


@torch.no_grad()
def start_random(draft: nn.Module) -> None:
    """Draw every matrix anew."""
    for weight in draft.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.02)


@torch.no_grad()
def copy_matching(weight: Tensor, weights: dict[str, Tensor], name: str) -> bool:
    """Copy the weight of that name, where there is one of the same shape; whether there was."""
    matches = name in weights and weights[name].shape == weight.shape
    if matches:
        weight.copy_(weights[name])
    return matches


@torch.no_grad()
def start_at_the_end(draft: Any, target: Target, weights: dict[str, Tensor]) -> list[str]:
    """Feed a draft the highest of the target's states alone, and end with the target's norm;
    returns what it lacks of them: the biases of a layer's weights, all but the scale of a norm."""
    weight_H, same = target.final_norm()
    draft.norm.weight.copy_(weight_H)
    H = len(weight_H)
    draft.fc.weight.zero_()[:, -H:] = torch.eye(H)
    missing = [name for name in weights if name.endswith(".bias")]
    return missing if same else [*missing, "the mean and bias of the last norm"]
