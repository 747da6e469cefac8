"""From a target's last hidden states to the logits that it serves.

Shape suffixes: N rows, H hidden, V vocabulary, L columns of a tile.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_exp.errors import InputError

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Difference from the model's own logits, as a share of the largest."""


@dataclass(frozen=True)
class Ending:
    """What a model makes of the bare products of its head: softcap * tanh(scale * x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, products: Tensor) -> Tensor:
        """Logits; the products themselves where there is nothing to be made of them."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def backward(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """The gradient in the products, from that in the logits."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale


@dataclass(frozen=True)
class Head:
    """softcap * tanh(scale * (W h + b) / softcap), as far as the model has these."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    tokens: int | None = None
    """Rows that the tokenizer has a token for; the padding after them is never sampled."""

    @property
    def ending(self) -> Ending:
        """What is made of its products."""
        return Ending(self.scale, self.softcap)

    @torch.no_grad()
    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of post-norm last hidden states, in their dtype."""
        logits_NV = self.ending.logits(F.linear(hidden_NH, self.weight_VH, self.bias_V))
        if self.tokens is not None and self.tokens < len(self.weight_VH):
            logits_NV[..., self.tokens :] = float("-inf")
        return logits_NV

    def tile(self, hidden_NH: Tensor, columns: slice) -> Tensor:
        """Some columns of the logits, fp32, with the padding as the model has it."""
        logits_NL = hidden_NH @ self.weight_VH[columns].T
        if self.bias_V is not None:
            logits_NL = logits_NL + self.bias_V[columns]
        return self.ending.logits(logits_NL.float())


def fit_head(
    weight_VH: Tensor, bias_V: Tensor | None, hidden_NH: Tensor, served_NV: Tensor, text: Any
) -> Head:
    """The head that gives the logits that the model gave for these states.

    A family's scale may divide or multiply and has many names, so every number of the configuration
    that speaks of logits is tried in every role, and what comes nearest is taken.

    Raises:
        InputError: nothing comes near enough.
    """
    numbers = {
        float(value)
        for name, value in text.to_dict().items()
        if isinstance(value, int | float) and value > 0 and not isinstance(value, bool)
        if any(part in name for part in ("logit", "lm_head", "softcap"))
        if not any(part in name for part in ("attn", "attention", "router"))
    }
    scales = dict.fromkeys([1.0, *(n for c in sorted(numbers) for n in (c, 1 / c))])
    largest = max(float(served_NV.abs().max()), 1e-9)
    best, error = Head(weight_VH, bias_V), float("inf")
    for scale, softcap in product(scales, [None, *sorted(numbers)]):
        head = Head(weight_VH, bias_V, scale, softcap)
        logits_NV = head.tile(hidden_NH, slice(None))
        difference = float((logits_NV - served_NV.float()).abs().max()) / largest
        if difference < error:
            best, error = head, difference
    if not error <= TOLERANCE[hidden_NH.dtype]:
        raise InputError(
            f"the logits of {text.model_type} are not those of its last hidden states and its head "
            f"(they differ by {error:.0%}), so a draft cannot be compared with what it serves"
        )
    return best
