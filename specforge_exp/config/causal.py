"""How a causal language model itself is trained: python pretrain.py, python sft.py."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from specforge_exp.config.checks import SWITCHED, above_zero, allow, minimums
from specforge_exp.errors import InputError


@dataclass
class CausalConfig:
    """What pretrain and sft share."""

    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss; 1e-4 keeps logits of long runs from drifting."""
    beta2: float = 0.95
    """AdamW's second moment."""
    packing: bool = True
    """Conversations of a forward side by side, each seeing itself alone; false: one by one, for
    models that cannot. Changes a number by rounding alone."""
    attention: str = "auto"
    """auto (flash attention where there is one, else documents), documents (a call for each
    conversation), sdpa, eager or flash_attention_2."""
    liger: str = "auto"
    """Liger's kernels on a GPU: auto (where the extra liger is installed), on or off."""

    def __post_init__(self) -> None:
        minimums(self, "causal.", z_loss=0, beta2=0)
        if self.beta2 >= 1:
            raise InputError(f"causal.beta2={self.beta2} must be below 1")
        self.liger = SWITCHED.get(self.liger, self.liger)
        allow(self, "causal.", liger="auto on off")
        allow(self, "causal.", attention="auto documents sdpa eager flash_attention_2")


@dataclass
class TextSource:
    """Where text to pretrain on comes from."""

    path: str = MISSING
    """hub:<id>[/<configuration>][:<split>], streamed; or a .jsonl, .json, .parquet or .txt file, or
    a folder of them (documents of .txt files are parted by empty lines); synthetic:<split>."""
    field: str = "text"
    """The column with the text."""
    weight: float = 1.0
    """Its share of the rows, among those of all sources."""

    def __post_init__(self) -> None:
        above_zero(self, "pretrain.sources.", "weight")


@dataclass
class PretrainConfig:
    """python pretrain.py"""

    sources: list[TextSource] = field(
        default_factory=lambda: [TextSource("hub:HuggingFaceFW/fineweb-edu/sample-10BT")]
    )
    """The mixture; each begins again when it ends."""
    eval_documents: int = 64
    """The first so many documents of each source are held out."""
    workers: int = 2
    """Processes that tokenise; 0: this one. Changes no number."""

    def __post_init__(self) -> None:
        minimums(self, "pretrain.", eval_documents=1, workers=0)
