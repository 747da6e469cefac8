"""The options of a P-EAGLE draft."""

from dataclasses import dataclass
from typing import ClassVar

from specforge_exp.config.checks import allow, minimums, up_to_one
from specforge_exp.drafts.eagle3.config import EagleConfig
from specforge_exp.errors import InputError


@dataclass
class PEagleConfig(EagleConfig):
    """Its depths, and which of them are trained."""

    steps_option: ClassVar[str] = "num_depths"
    defining: ClassVar[tuple[str, ...]] = (*EagleConfig.defining, "mask_token_id")

    _target_: str = "specforge_exp.drafts.peagle.PEagle"
    """Dotted path of the draft's class."""
    num_layers: int = 4
    """Layers of the draft; those after the first read states alone."""
    num_depths: int = 8
    """Tokens that are guessed in one pass."""
    down_sample_ratio: float = 0.7
    """Depth d trains this share, to the power of d, of a conversation's slots."""
    down_sample_ratio_min: float = 0.2
    """And at least this share."""
    max_anchors: int | None = None
    """Slots of a conversation that train more than their first depth, at most; null: all."""
    depth_decay: float = 1.0
    """Depth d weighs depth_decay**d in the loss."""
    mask_token_id: int | None = None
    """The token that stands for those not known yet; null: the last of the vocabulary."""
    supervision: str = "inference"
    """Which slots train at which depths: inference (the chains that exist when serving), or the
    peer's way: speculators."""

    def __post_init__(self) -> None:
        minimums(self, "draft.", num_depths=1, max_anchors=1, mask_token_id=0)
        super().__post_init__()
        allow(self, "draft.", supervision="inference speculators")
        shares = ("down_sample_ratio", "down_sample_ratio_min", "depth_decay")
        up_to_one(self, "draft.", **dict.fromkeys(shares, "(0, 1]"))
        if self.norm_output:
            raise InputError(
                "draft.norm_output=true says what the next step is fed, and P-EAGLE's depths are "
                "fed nothing of one another; leave it false"
            )

    @property
    def steps(self) -> int:
        """Depths."""
        return self.num_depths

    @property
    def formats(self) -> tuple[str, ...]:
        """Both, but with fc_norm, which vLLM 0.32 does not read of a P-EAGLE in speculators'."""
        return super().formats[: 1 if self.fc_norm else 2]

    def chain_length(self, length: int | None) -> int:
        """All depths, unless bench.chain_length says less."""
        if length and length > self.num_depths:
            raise InputError(
                f"bench.chain_length={length} must be at most draft.num_depths={self.num_depths}: "
                "what lies deeper was not trained"
            )
        return length or self.num_depths
