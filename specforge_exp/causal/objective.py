"""The objective `causal_lm`: the mean cross-entropy of the next token over an optimiser window."""

import math

import numpy as np
import torch
from torch import Tensor

from specforge_exp.causal.model import Causal, predicted
from specforge_exp.training.batches import Batch
from specforge_exp.training.features import Features
from specforge_exp.training.objective import Measure, Objective, Outcome

RESAMPLES = 1000


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """nll (nats per predicted token), its perplexity, top1, and how many tokens were predicted."""
    rows = max(1.0, float(sums["rows"][0]))
    nll = float(sums["nll"][0]) / rows
    top1 = float(sums["top1"][0]) / rows
    return {
        "nll": nll, "perplexity": math.exp(min(nll, 700.0)), "top1": top1,
        "supervised": float(sums["rows"][0]),
    }  # fmt: skip


def summary(metrics: dict[str, float]) -> str:
    """One line of the numbers that matter."""
    interval = ""
    if "loss_low" in metrics:
        interval = f" ({metrics['loss_low']:.4f} to {metrics['loss_high']:.4f})"
    return (
        f"loss {metrics['loss']:.4f}{interval}, perplexity {metrics['perplexity']:.3f}, "
        f"top-1 {metrics['top1']:.3f}"
    )


def line(metrics: dict[str, float]) -> str:
    """One line while it trains."""
    speed, mfu = metrics["tokens_per_s"], metrics["mfu"]
    return f"loss {metrics['loss']:.4f}, {speed:,.0f} tokens/s, MFU {mfu:.0%}"


def intervals(pairs: list[list[float]]) -> dict[str, float]:
    """95 % interval of the loss over resamples of the conversations."""
    if len(pairs) < 2:
        return {}
    losses, tokens = np.array(pairs).T
    chosen = np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    ratios = losses[chosen].sum(1) / np.maximum(tokens[chosen].sum(1), 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"loss_low": float(low), "loss_high": float(high)}


CAUSAL = Measure(means, summary, ("loss", "tokens"), "loss", "loss", line, False, intervals)
"""What a causal model reports."""


def causal_lm(causal: Causal, device: torch.device) -> Objective:
    """The model's objective, as the training loop wants it."""

    def denominators(batch: Batch) -> Tensor:
        return torch.tensor([float(predicted(batch).sum())], dtype=torch.float64)

    def forward(batch: Batch, window_K: Tensor) -> Outcome:
        outcome: Outcome = causal(batch, window_K)[1]
        return outcome

    nothing_2 = torch.zeros(2, dtype=torch.long)
    idle = Batch(nothing_2.to(device), nothing_2, [0], [2], 0)
    nothing_else = Features(lambda batches: list)
    return Objective(
        1, CAUSAL, nothing_else, lambda batches, _: batches, denominators, idle, forward,
        sparing=True, betas=(0.9, causal.cfg.beta2), decays_all=False,
    )  # fmt: skip
