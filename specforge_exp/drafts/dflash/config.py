"""The options of a DFlash draft."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from specforge_exp.config.checks import (
    above_zero,
    allow,
    minimums,
    only_with,
    some_of_all,
)
from specforge_exp.config.choices import DraftConfig
from specforge_exp.errors import InputError

ADDED: dict[str, Any] = {
    "sample_from_anchor": False,
    "sliding_window": None,
    "full_attention_indices": [],
    "sliding_window_non_causal": False,
    "window": "slot",
    "position_weights": "decay",
    "dpace_alpha": 0.5,
    "divisor": "weights",
}
"""What options mean that runs without them were trained by."""


@dataclass
class DFlashConfig(DraftConfig):
    """Its shape, and the blocks that it is trained on."""

    steps_option: ClassVar[str] = "block_size"
    replayed: ClassVar[bool] = True
    quiet: ClassVar[tuple[str, ...]] = ("attention", "draft_vocab_size")
    defining: ClassVar[tuple[str, ...]] = (
        "num_layers", "num_features", "block_size", "mask_token_id", "sample_from_anchor",
        "sliding_window", "full_attention_indices", "sliding_window_non_causal", "window",
    )  # fmt: skip
    unsaid: ClassVar[dict[str, Any]] = ADDED

    _target_: str = "specforge_exp.drafts.dflash.DFlash"
    """Dotted path of the draft's class."""
    start: str = "random"
    """target: a copy of the target's last layers and norm, as far as they mean the same there;
    random: nothing but noise."""
    block_size: int = 16
    """Slots of a block, the token it starts from included."""
    num_layers: int = 5
    """Layers of the draft."""
    num_features: int = 5
    """Layers of the target whose states are its context."""
    num_anchors: int = 512
    """Blocks drawn in each conversation and epoch, at most."""
    loss_gamma: float = 7.0
    """The label k places after its anchor weighs exp(-(k - 1) / loss_gamma)."""
    position_weights: str = "decay"
    """decay: by loss_gamma; dpace: what the label adds to the expected length of its own block, by
    the draft's probabilities of the text (D-PACE, arXiv 2605.18810)."""
    dpace_alpha: float = 0.5
    """dpace: a probability q counts as (1 - dpace_alpha) q + dpace_alpha."""
    divisor: str = "weights"
    """The loss is divided by the sum of the labels' decaying weights, or as speculators does by
    their number (labels), which is also what dpace's is divided by."""
    min_loss_tokens: int | None = None
    """Conversations with fewer supervised tokens are left out; null: twice block_size."""
    mask_token_id: int | None = None
    """The token that stands for masked slots; null: the last of the vocabulary."""
    sample_from_anchor: bool = False
    """Whether the anchor's slot says the token after it and every slot the one after its place, as
    in speculators' DSpark; false: a masked slot says the token in its place."""
    sliding_window: int | None = None
    """Layers see the last so many positions of the context alone; null: all of it."""
    full_attention_indices: list[int] = field(default_factory=list)
    """With sliding_window: layers, counted from 0, that see all of the context."""
    sliding_window_non_causal: bool = False
    """Whether slots see those after them in layers with a window too, as they do in all others."""
    window: str = "slot"
    """Where a window ends: slot: at each slot's own place, which it counts, as engines count;
    block: before the anchor, for all slots of the block, as speculators trains."""
    attention: str = "auto"
    """flex: FlexAttention, one compiled kernel; merged: plain products on any device; auto: flex on
    CUDA. Changes no number but its rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        minimums(
            self, "draft.", block_size=2, num_layers=1, num_features=1, num_anchors=1,
            min_loss_tokens=1, mask_token_id=0,
        )  # fmt: skip
        above_zero(self, "draft.", "loss_gamma")
        allow(
            self, "draft.", start="target random", attention="auto flex merged",
            position_weights="decay dpace", divisor="weights labels", window="slot block",
        )  # fmt: skip
        if not 0 <= self.dpace_alpha <= 1:
            raise InputError(f"draft.dpace_alpha={self.dpace_alpha} must be from 0 to 1")
        dpace = self.position_weights == "dpace"
        only_with(self, "draft.", dpace, "draft.position_weights=dpace", "dpace_alpha")
        self.check_window()

    def check_window(self) -> None:
        """Refuse windows and layers that do not fit each other."""
        window, full = self.sliding_window, self.full_attention_indices
        if window is not None and window <= self.block_size:
            raise InputError(
                f"draft.sliding_window={window} must be above draft.block_size={self.block_size}: "
                "a block sees itself, and at least one position of its context"
            )
        if full and window is None:
            raise InputError(f"draft.full_attention_indices={full} needs draft.sliding_window")
        windowed = "window sliding_window_non_causal"
        only_with(self, "draft.", window is not None, "draft.sliding_window", windowed)
        some_of_all("draft.full_attention_indices", full, self.num_layers)
        if wrong := [index for index in full if not 0 <= index < self.num_layers]:
            raise InputError(
                f"draft.full_attention_indices={full}: draft.num_layers={self.num_layers} has no "
                f"layer {wrong[0]}; they are counted from 0"
            )

    def matters(self) -> dict[str, Any]:
        """As `DraftConfig.matters`, without what says the same as its absence."""
        kept = super().matters().items()
        return {name: value for name, value in kept if ADDED.get(name, ...) != value}

    @property
    def steps(self) -> int:
        """The slots of a block that say a token."""
        return self.block_size - (not self.sample_from_anchor)

    @property
    def formats(self) -> tuple[str, ...]:
        """Both."""
        return ("sglang", "speculators")

    @property
    def features(self) -> int:
        """As many as `num_features`."""
        return self.num_features

    def chain_length(self, length: int | None) -> int:
        """The rest of a block, unless bench.chain_length says less."""
        if length and length > self.steps:
            fault = "be below" if self.steps < self.block_size else "not be above"
            raise InputError(
                f"bench.chain_length={length} must {fault} draft.block_size={self.block_size}: "
                "a block starts with a token that is there already"
            )
        return length or self.steps
