"""The learning rate of every step."""

import math

from specforge_exp.config import TrainerConfig


def learning_rate(step: int, total: int, peak: float, cfg: TrainerConfig) -> float:
    """Linear warm-up over warmup_ratio * total steps, then a cosine to min_lr_ratio * peak.

    Args:
        step: 0-based optimiser step.
        total: optimiser steps of the whole run.
        peak: the highest rate.
        cfg: warm-up share and floor.
    """
    warmup = max(1, round(cfg.warmup_ratio * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    floor = cfg.min_lr_ratio
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
