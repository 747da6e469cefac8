"""What the training loop and a draft's objective pass each other.

Shape suffixes: T packed tokens, K steps, H hidden, A auxiliary states, B conversations.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from specforge_exp.training.batches import Batch
from specforge_exp.training.features import Features, States


@dataclass(frozen=True)
class Sample(Batch):
    """A batch with what the target says about it."""

    aux_TA: Tensor
    """Its hidden states at the layers that feed the draft, side by side."""
    last_TH: Tensor
    """Its post-norm last hidden states."""


def samples_of(batches: list[Batch], states: States) -> list[Sample]:
    """Batches with the target's states."""
    return [
        Sample(**vars(batch), aux_TA=aux_TA, last_TH=last_TH)
        for batch, (aux_TA, last_TH) in zip(batches, states, strict=True)
    ]


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


@dataclass(frozen=True)
class Objective:
    """What is trained."""

    steps: int
    """How many divisors a window has."""
    features: Features
    """Where the target's states come from."""
    denominators: Callable[[Batch], Tensor]
    """What a batch adds to the divisors of the window, [K]; known before any forward."""
    idle: Sample
    """A sample without loss and gradient."""
    forward: Callable[[Sample, Tensor], Outcome]
    """(sample, the window's divisors) -> a share of the window's loss, and sums."""
