"""The options of an EAGLE-3 draft."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from specforge_exp.config.checks import allow, minimums, some_of_all, up_to_one
from specforge_exp.config.choices import DraftConfig, LossConfig
from specforge_exp.errors import InputError

PEERS_TERMS = {
    "specforge": ("lambda_ce", "lambda_lk_alpha", "lambda_lk"),
    "speculators": ("lambda_ce", "lambda_rkl", "lambda_tv", "lambda_lk_alpha"),
}
"""The loss's weights that a peer's way to supervise has a term for."""


@dataclass
class Variant:
    """What EAGLE-3.1 changes of EAGLE-3's layer and its norms: nothing, as it is here."""

    num_layers: int = 1
    """Layers of the draft; those after the first read states alone."""
    norm_before_fc: bool = False
    """One norm over the target's states, side by side, before they are projected."""
    fc_norm: bool = False
    """A norm for each of the target's states before they are projected together."""
    norm_before_residual: bool = False
    """The first layer adds to its state as normed, not to the state as it came."""
    norm_output: bool = False
    """A step is fed what the head read at the step before: the normed state."""
    sliding_window: int | None = None
    """Positions that a layer sees, the row's own included; null: all."""
    full_attention_layers: list[int] = field(default_factory=list)
    """Layers (0-based) that see all positions in spite of draft.sliding_window."""

    def check_variant(self, option: str, steps: int) -> None:
        """Refuse what no engine computes; `option` is the name of what says `steps`."""
        minimums(self, "draft.", num_layers=1)
        if self.norm_before_fc and self.fc_norm:
            raise InputError(
                "draft.norm_before_fc=true and draft.fc_norm=true: one norm over the target's "
                "states, or one for each; choose one"
            )
        for layer in self.full_attention_layers:
            if not 0 <= layer < self.num_layers or self.sliding_window is None:
                raise InputError(
                    f"draft.full_attention_layers={self.full_attention_layers} names layers below "
                    f"draft.num_layers={self.num_layers}, and needs draft.sliding_window"
                )
        some_of_all("draft.full_attention_layers", self.full_attention_layers, self.num_layers)
        if self.sliding_window is not None and self.sliding_window < max(2, steps):
            raise InputError(
                f"draft.sliding_window={self.sliding_window} must be at least 2 and at least "
                f"draft.{option}={steps}: a chain sees itself"
            )

    @property
    def windows(self) -> list[int | None]:
        """Of every layer."""
        full = self.full_attention_layers
        return [None if n in full else self.sliding_window for n in range(self.num_layers)]

    def changes(self) -> dict[str, Any]:
        """The options that are not as they are here."""
        plain = Variant()
        return {
            name: vars(self)[name]
            for name, value in vars(plain).items()
            if vars(self)[name] != value
        }


@dataclass
class EagleConfig(DraftConfig, Variant):
    """What the drafts of this architecture have."""

    defining: ClassVar[tuple[str, ...]] = ("draft_vocab_size", *vars(Variant()))
    unsaid: ClassVar[dict[str, Any]] = vars(Variant())

    start: str = "target"
    """target: a copy of the target's last norm and head and of the projections and norms of its
    last layers, as far as they mean the same there; random: nothing but noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allow(self, "draft.", start="target random")
        self.check_variant(self.steps_option, self.steps)

    @property
    def features(self) -> int:
        """Three, whatever the target."""
        return 3

    @property
    def formats(self) -> tuple[str, ...]:
        """Both."""
        return ("sglang", "speculators")

    def check_loss(self, loss: LossConfig) -> None:
        """A peer's way to supervise has the peer's own terms."""
        terms = {"_target_": LossConfig._target_, **dict.fromkeys(loss.weights(), 0)}
        known = PEERS_TERMS.get(vars(self)["supervision"], terms)
        for name, plain in terms.items():
            if name not in known and vars(loss)[name] != plain:
                raise InputError(
                    f"draft.supervision={vars(self)['supervision']} would leave out loss.{name}="
                    f"{vars(loss)[name]}: it has the peer's terms, of {', '.join(known)}; "
                    "draft.supervision=inference has all"
                )

    def matters(self) -> dict[str, Any]:
        """A variant's options where they change something."""
        plain = vars(Variant())
        own = {name: value for name, value in super().matters().items() if name not in plain}
        return {**own, **self.changes()}


@dataclass
class Eagle3Config(EagleConfig):
    """The steps of its training, and which of them count."""

    steps_option: ClassVar[str] = "ttt_length"
    replayed: ClassVar[bool] = True

    _target_: str = "specforge_exp.drafts.eagle3.Eagle3"
    """Dotted path of the draft's class."""
    ttt_length: int = 7
    """Unrolled steps of training-time test."""
    ttt_decay: float = 0.8
    """Step k weighs ttt_decay**k in the loss."""
    supervision: str = "inference"
    """Which (slot, step) pairs train and how they are averaged: inference (the states that exist
    when serving; the mean per step), or a peer's way: specforge, speculators. SpecForge's LK terms
    are means over each forward, so trainer.pack_tokens and the number of processes change them."""

    def __post_init__(self) -> None:
        minimums(self, "draft.", ttt_length=1)
        super().__post_init__()
        up_to_one(self, "draft.", ttt_decay="(0, 1]")
        allow(self, "draft.", supervision="inference specforge speculators")

    def check_replay(self) -> None:
        """The peers' supervision trains states that no proposal has."""
        super().check_replay()
        if self.supervision != "inference":
            raise InputError(f"onpolicy needs draft.supervision=inference, not {self.supervision}")

    @property
    def steps(self) -> int:
        """Unrolled steps."""
        return self.ttt_length
