"""What the training loop and a draft's objective pass each other.

Shape suffixes: T packed tokens, K steps, H hidden, A = 3 H, B conversations.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Conversations one after the other, with what the target says about them."""

    ids_T: Tensor
    turns_T: Tensor
    """The number of the assistant turn a token belongs to, from 1; 0 elsewhere."""
    lengths: list[int]
    """Tokens of each conversation."""
    aux_TA: Tensor
    last_TH: Tensor


@dataclass(frozen=True)
class Outcome:
    """What one forward of the objective gives."""

    loss: Tensor
    """To be differentiated as it is; the sum over an optimiser window is the window's loss."""
    step_loss_K: Tensor
    """The loss of each step, not multiplied by ttt_decay**k; detached."""
    sums: dict[str, Tensor]
    """Sums over rows per step ([K], detached); divide by `rows` for a mean."""
    lengths_B2: Tensor | None = None
    """Without gradients: of each conversation the sum of the simulated accepted length over its
    slots, and their number."""
    flops: float = 0.0
    """Needed floating-point operations of forward and backward."""
