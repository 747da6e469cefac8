"""The learning rate of every step."""

import math

from specforge_exp.config import TrainerConfig


def learning_rate(step: int, total: int, peak: float, cfg: TrainerConfig) -> float:
    """Linear warm-up over warmup_ratio * total steps, then the schedule down to min_lr_ratio.

    cosine and linear fall from the warm-up to the end; constant stays; wsd (warm-up, stable,
    decay) stays and falls over the last decay_ratio * total steps in the shape of decay_shape.

    Args:
        step: 0-based optimiser step.
        total: optimiser steps of the whole run.
        peak: the highest rate.
        cfg: schedule, warm-up share, decay share and floor.
    """
    warmup = max(1, round(cfg.warmup_ratio * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    begin, shape = warmup, cfg.schedule
    if cfg.schedule == "constant":
        return peak
    if cfg.schedule == "wsd":
        begin, shape = max(warmup, total - round(cfg.decay_ratio * total)), cfg.decay_shape
    progress = max(0, step - begin) / max(1, total - begin)
    remaining = 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * remaining)
