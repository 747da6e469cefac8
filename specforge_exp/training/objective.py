"""What the training loop and an objective pass each other.

Shape suffixes: T packed tokens, K steps, H hidden, A auxiliary states, B conversations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specforge_exp.training.batches import Batch
from specforge_exp.training.features import Features, States


@dataclass(frozen=True)
class Replay:
    """What a draft proposed after tokens of packed conversations, and the target's verdict; all but
    the states on the CPU."""

    anchor_R: Tensor
    """Positions of those tokens."""
    tokens_KR: Tensor
    """Proposed tokens, step by step."""
    last_PH: Tensor
    """The target's post-norm last hidden states at all but the last of them, in their order."""
    counts_RK: Tensor
    """Whether a proposed token's position counts: the first of each chain that do, bool."""
    accepted_RK: Tensor
    """Whether the target accepts it and all before, bool."""
    flops: float = 0.0
    """Of proposing, and of the target's head."""


@dataclass(frozen=True)
class Sample(Batch):
    """A batch with what the target says about it."""

    aux_TA: Tensor
    """Its hidden states at the layers that feed the draft, side by side."""
    last_TH: Tensor
    """Its post-norm last hidden states."""
    replay: Replay | None = None
    """What the draft proposed in it."""
    decoded_4: Tensor | None = None
    """Of its answers that draft and target have just written: tokens gained in verifications,
    verifications, tokens that the target read, tokens that the draft read or proposed; float64."""


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
    pairs_B2: Tensor | None = None
    """Without gradients: of each conversation the two numbers that `Measure.pair` names."""
    flops: float = 0.0
    """Needed floating-point operations of forward and backward."""


@dataclass(frozen=True)
class Measure:
    """What an objective reports, and which of its evaluations is the best."""

    means: Callable[[dict[str, Tensor]], dict[str, float]]
    """The sums of all outcomes -> metrics."""
    summary: Callable[[dict[str, float]], str]
    """One line of the metrics that matter."""
    pair: tuple[str, str]
    """In evaluation.json: what a conversation's sum, and its number of terms, are called."""
    best: str
    """The metric that evaluations are compared by."""
    short: str
    """Its name in the progress bar."""
    line: Callable[[dict[str, float]], str] | None = None
    """What is said of a line of metrics; None: nothing beyond the bar."""
    larger: bool = True
    """Whether more of it is better."""
    intervals: Callable[[list[list[float]]], dict[str, float]] = lambda pairs: {}
    """The conversations' pairs -> metrics of an evaluation that say how sure it is."""


@dataclass(frozen=True)
class Objective:
    """What is trained."""

    steps: int
    """How many divisors a window has."""
    measure: Measure
    features: Features
    """Where what else is needed comes from, as a target's states."""
    prepare: Callable[[list[Batch], States], Sequence[Batch]]
    """Add it to batches, which may become others."""
    denominators: Callable[[Batch], Tensor]
    """What a batch adds to the divisors of the window, [K]; known before any forward."""
    idle: Batch
    """A sample without loss and gradient."""
    forward: Callable[[Any, Tensor], Outcome]
    """(a prepared batch, the window's divisors) -> a share of the window's loss, and sums."""
    sparing: bool = False
    """Whether weights that processes share are let go after every forward, as of a large model;
    false: kept in full for a window, as of a draft."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    begin: Callable[[int], None] = lambda step: None
    """What comes before the batches of a step are prepared; every process calls it."""
    decays_all: bool = True
    """Whether the weight decay is for vectors (norms, biases) too."""
