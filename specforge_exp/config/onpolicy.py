"""Whether a draft is also trained on what it proposes itself, and how (docs/onpolicy.md)."""

from dataclasses import asdict, dataclass, field
from typing import Any

from specforge_exp.config.checks import above_zero, allow, minimums, up_to_one
from specforge_exp.errors import InputError


@dataclass
class ProposedTerms:
    """Weights of the loss's terms at some proposed positions; see loss.*."""

    lambda_ce: float = 0.0
    """Of the cross-entropy against the target's distribution."""
    lambda_rkl: float = 0.0
    """Of the reverse KL divergence."""
    beta: float = 0.0
    """Of the acceptance hinge."""
    lambda_tv: float = 0.0
    """Of the total variation."""
    lambda_lk_alpha: float = 0.0
    """Of -log acceptance rate."""
    lambda_lk: float = 0.0
    """Of LK-lambda."""


@dataclass
class OnPolicyConfig:
    """Replay: the draft proposes after some tokens of the text, the target judges, it learns."""

    name: str = "none"
    """none; replay: train on proposals too, at draft-induced prefixes; rollout: and the text is
    what draft and target write now, the anchors where the draft was wrong in it."""
    weight: float = 1.0
    """Weight of the replay's loss."""
    level0: float = 1.0
    """Weight of the loss on the text, beside it; 0: it is only measured. Before `start`, and for
    held-out conversations, it is 1."""
    start: int = 0
    """Optimiser steps before the first one with replay."""
    anchors: int = 32
    """Tokens of a conversation, at most, after which the draft proposes."""
    budget: float = 1.0
    """Verification tokens per token of the conversation, at most: fewer anchors in short ones."""
    errors: float = 0.5
    """Share of the anchors, at most, that stand before a token which the draft misses when it
    proposes from uniformly drawn ones; the rest is uniform."""
    length: int | None = None
    """Tokens proposed after an anchor; null: as many as the draft is trained on."""
    temperature: float = 0.0
    """Of proposing and verifying; 0: greedy."""
    decay: float = 0.8
    """The k-th proposed token weighs decay**(k - 1)."""
    beyond: int = 0
    """Positions after the first rejected one that count too, as rejected."""
    accepted: ProposedTerms = field(default_factory=lambda: ProposedTerms(lambda_ce=1.0))
    """The loss where the target accepts."""
    rejected: ProposedTerms = field(default_factory=lambda: ProposedTerms(lambda_rkl=1.0))
    """The loss where it rejects."""
    sync_every: int = 100
    """rollout: steps between two times that the generator takes the draft's weights and answers the
    prompts of the following ones."""
    max_tokens: int | None = None
    """rollout: tokens of an answer, at most; null: as many as max_length leaves."""
    dry_run: bool = False
    """train prints what the target will read, and trains nothing."""

    def __post_init__(self) -> None:
        allow(self, "onpolicy.", name="none replay rollout")
        minimums(
            self, "onpolicy.", level0=0, start=0, anchors=1, length=1, temperature=0, beyond=0,
            sync_every=1, max_tokens=2,
        )  # fmt: skip
        above_zero(self, "onpolicy.", "weight budget")
        up_to_one(self, "onpolicy.", errors="[0, 1]", decay="(0, 1]")
        for name in ("accepted", "rejected"):
            minimums(
                vars(self)[name], f"onpolicy.{name}.", **dict.fromkeys(vars(vars(self)[name]), 0)
            )
        if not any([*vars(self.accepted).values(), *vars(self.rejected).values()]):
            raise InputError(
                "at least one weight of onpolicy.accepted or .rejected must be above 0"
            )

    @property
    def replays(self) -> bool:
        """Whether proposals are trained on."""
        return self.name != "none"

    @property
    def rolls(self) -> bool:
        """Whether the answers are the draft's and the target's of now."""
        return self.name == "rollout"

    def matters(self) -> dict[str, Any]:
        """The options that a training depends on."""
        quiet = ["dry_run"] if self.rolls else ["dry_run", "sync_every", "max_tokens"]
        return {name: value for name, value in asdict(self).items() if name not in quiet}
