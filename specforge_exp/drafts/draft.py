"""What every draft has: an objective that is called as a module, and a feed-forward block.

Shape suffixes: H hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_exp.drafts.layers import gradient_of
from specforge_exp.training.objective import Outcome


class Draft(nn.Module):
    """A draft in training; a subclass has `objective`."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.compute_dtype = torch.float32  # of training; weights and their gradients stay fp32

    def objective(self, *arguments: Any) -> Outcome:
        """(sample, target's head [V, H], loss, configuration of the draft, divisors [K])."""
        raise NotImplementedError

    def forward(self, *arguments: Any) -> tuple[Tensor, Outcome]:
        """`objective`, called as a module so that the hooks of a sharding run; (loss, outcome).

        Gradients exist from the start: what is added to them must be the same tensors everywhere.
        """
        if torch.is_grad_enabled():
            for weight in self.parameters():
                gradient_of(weight)
        outcome = self.objective(*arguments)
        return outcome.loss, outcome


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, size, bias=False)
        self.up_proj = nn.Linear(hidden, size, bias=False)
        self.down_proj = nn.Linear(size, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
