"""The options of a DFlash draft."""

from dataclasses import dataclass
from typing import ClassVar

from specforge_exp.config.checks import at_least, one_of
from specforge_exp.config.choices import DraftConfig
from specforge_exp.errors import InputError


@dataclass
class DFlashConfig(DraftConfig):
    """Its shape, and the blocks that it is trained on."""

    steps_option: ClassVar[str] = "block_size"
    replayed: ClassVar[bool] = True
    quiet: ClassVar[tuple[str, ...]] = ("attention", "draft_vocab_size")

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
    min_loss_tokens: int | None = None
    """Conversations with fewer supervised tokens are left out; null: twice block_size."""
    mask_token_id: int | None = None
    """The token that stands for masked slots; null: the last of the vocabulary."""
    attention: str = "auto"
    """flex: FlexAttention, one compiled kernel; merged: plain products on any device; auto: flex on
    CUDA. Changes no number but its rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("draft.block_size", self.block_size, 2)
        for name in ("num_layers", "num_features", "num_anchors", "min_loss_tokens"):
            at_least(f"draft.{name}", vars(self)[name], 1)
        at_least("draft.mask_token_id", self.mask_token_id, 0)
        if self.loss_gamma <= 0:
            raise InputError(f"draft.loss_gamma={self.loss_gamma} must be above 0")
        one_of("draft.start", self.start, ("target", "random"))
        one_of("draft.attention", self.attention, ("auto", "flex", "merged"))

    @property
    def steps(self) -> int:
        """The masked slots of a block."""
        return self.block_size - 1

    @property
    def features(self) -> int:
        """As many as `num_features`."""
        return self.num_features

    def chain_length(self, length: int | None) -> int:
        """The rest of a block, unless bench.chain_length says less."""
        if length and length >= self.block_size:
            raise InputError(
                f"bench.chain_length={length} must be below draft.block_size={self.block_size}: "
                "a block starts with a token that is there already"
            )
        return length or self.steps
