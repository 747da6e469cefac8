"""What the training loop and a draft's objective pass each other.

Shape suffixes: B batch, T tokens, K steps, H hidden, A = 3 H.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """A batch of conversations with what the target says about them."""

    ids_BT: Tensor
    turns_BT: Tensor
    """The number of the assistant turn a token belongs to, from 1; 0 elsewhere."""
    aux_BTA: Tensor
    last_BTH: Tensor
    valid_BT: Tensor | None = None
    """Nonzero where a token is real; None: padding is on the right and hidden by causality."""


@dataclass(frozen=True)
class Outcome:
    """What one forward of the objective gives."""

    loss: Tensor
    """To be differentiated; the sum over an optimiser window is the window's loss."""
    step_loss_K: Tensor
    """The loss of each step, not multiplied by ttt_decay**k; detached."""
    sums: dict[str, Tensor]
    """Sums over rows per step ([K], detached); divide by `rows` for a mean."""
