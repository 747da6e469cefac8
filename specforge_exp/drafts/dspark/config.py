"""The options of a DSpark draft."""

from dataclasses import dataclass
from typing import ClassVar

from specforge_exp.config.checks import allow, minimums, only_with
from specforge_exp.drafts.dflash.config import DFlashConfig


@dataclass
class DSparkConfig(DFlashConfig):
    """DFlash's options, and its two heads."""

    defining: ClassVar[tuple[str, ...]] = (
        *DFlashConfig.defining, "markov_rank", "markov_head_type", "enable_confidence_head",
        "confidence_head_with_markov",
    )  # fmt: skip
    replayed: ClassVar[bool] = False  # a proposal's heads read the proposals before it

    _target_: str = "specforge_exp.drafts.dspark.DSpark"
    """Dotted path of the draft's class."""
    sample_from_anchor: bool = True
    """Whether the anchor's slot says the token after it and every slot the one after its place;
    false: a masked slot says the token in its place, as in DFlash."""
    markov_rank: int = 256
    """Rank of what the token before adds to the logits of the next."""
    markov_head_type: str = "vanilla"
    """vanilla: by the token before alone; gated: and by the slot's state; rnn: and by all slots
    before. vLLM decodes vanilla heads."""
    enable_confidence_head: bool = True
    """Whether a head says how likely each token is to stand; needed by bench.verify=confidence."""
    confidence_head_with_markov: bool = True
    """Whether that head reads the token before, too."""
    confidence_weight: float = 1.0
    """Of that head's cross-entropy against the acceptance rates that the draft has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        minimums(self, "draft.", markov_rank=1, confidence_weight=0)
        allow(self, "draft.", markov_head_type="vanilla gated rnn")
        of_head = "confidence_weight confidence_head_with_markov"
        only_with(self, "draft.", self.confident, "draft.enable_confidence_head=true", of_head)

    @property
    def confident(self) -> bool:
        """With a confidence head."""
        return self.enable_confidence_head
