"""What a row's loss is made of, and how much it weighs in the loss of the optimiser window.

Shape suffixes: K steps, R rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.losses import TERMS, Loss, RowLoss, TeacherRows, opd


@dataclass(frozen=True)
class Weighting:
    """Terms of `losses.opd_closed`, or a function of its own."""

    terms: dict[str, Tensor]
    """Weight of each term at every step [K], divisors and decay included."""
    scale_K: Tensor
    """Weight of `function`'s value at every step."""
    decay_K: Tensor
    """The decay that is in the weights."""
    temperature: float = 1.0
    function: Callable[[Tensor, TeacherRows], RowLoss] | None = None
    """A loss that is not made of those terms; autograd differentiates it."""
    local: bool = False
    """Compare with p renormalised on the draft's vocabulary in every term."""
    floor: float = 0.0
    """See `opd_closed`."""
    drop_unknown: bool = False
    """Leave out rows whose target's best token the draft cannot say."""
    rows_KR: Tensor | None = None
    """What each row's loss is multiplied with beside its step's weight; None: 1."""

    def step_losses(self, sums: Mapping[str, Tensor]) -> Tensor:
        """The loss of each step, decay included, from the sums of the values; [K] fp32."""
        total_K = torch.zeros_like(self.scale_K)
        if self.rows_KR is not None:
            return total_K + sums.get("loss", 0)
        if self.function is not None:
            return total_K + self.scale_K * sums.get("loss", 0)
        for name, weight_K in self.terms.items():
            total_K = total_K + weight_K * sums.get(name, 0)
        return total_K


def weighted(loss: Loss, scale_K: Tensor, decay_K: Tensor) -> Weighting:
    """The terms of a loss by its own weights, every step scaled; or its function."""
    function, cfg, scale_K = loss.function, loss.cfg, scale_K * loss.scale
    if function is not opd:
        return Weighting(
            {}, scale_K, decay_K, cfg.temperature, lambda z, rows: function(z, rows, cfg)
        )
    terms = {TERMS[key][0]: weight * scale_K for key, weight in cfg.weights().items() if weight > 0}
    return Weighting(terms, scale_K, decay_K, cfg.temperature)
