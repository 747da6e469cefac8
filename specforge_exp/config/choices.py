"""What a run is made of: the config groups model, data, loss and draft."""

from dataclasses import dataclass, field
from os.path import expanduser
from typing import Any, ClassVar

from omegaconf import MISSING, OmegaConf

from specforge_exp.config.checks import (
    above_zero,
    allow,
    at_least,
    minimums,
    one_of,
    only_with,
    safe_name,
    up_to_one,
)
from specforge_exp.data.formats import FORMATS
from specforge_exp.errors import InputError

OURS = (
    "conversation tools add_generation_prompt continue_final_message tokenize padding truncation "
    "max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs"
).split()
"""Arguments of a tokenizer's chat template that are no switches of the template."""


@dataclass
class ModelConfig:
    """The target model."""

    name: str = MISSING
    """Short name, part of every artifact's name."""
    path: str = MISSING
    """Hugging Face hub id or a local folder."""
    dtype: str = "auto"
    """Weights in memory: auto (float32 on a CPU, bfloat16 on a GPU), float32 or bfloat16; those
    that pretrain and sft train are float32 always."""
    init: str = "weights"
    """pretrain, sft: begin with the model's weights, or with random ones of its configuration
    (random)."""
    aux_layers: list[int] | None = None
    """The layers (0-based) whose outputs feed the draft; null: what the draft wants (eagle3: 1,
    N/2-1 and N-4)."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the tokenizer's chat template, e.g. enable_thinking: false."""
    unused_weights: bool = False
    """Load a model whose files have weights that its architecture does not use (heads for other
    tasks); false: they are an error."""
    billions: float | None = None
    """Billions of parameters, for engine.tp_size; null: its configuration says it."""
    gpu: Any = None
    """What the model needs to be trained on, e.g. H100:8; null: this machine's CPU will do."""
    secrets: dict[str, list[str]] = field(default_factory=dict)
    """Modal secrets it takes to download it: name of the secret: keys."""

    def __post_init__(self) -> None:
        if not self.path:
            raise InputError("model=local needs model.path=<folder or hub id>")
        self.path = expanduser(self.path)  # of a file in conf/, which no shell reads
        safe_name("model.name", self.name)
        allow(self, "model.", dtype="auto float32 bfloat16", init="weights random")
        above_zero(self, "model.", "billions")
        for layer in self.aux_layers or ():
            at_least("model.aux_layers", layer, 0)
        if ours := [name for name in self.chat_template_kwargs if name in OURS]:
            raise InputError(
                f"model.chat_template_kwargs.{ours[0]} is set by what is rendered, not by a model"
            )


@dataclass
class Source:
    """Where conversations come from."""

    path: str = MISSING
    """A .jsonl, .json or .parquet file or a folder of them; hub:<id>[/<configuration>][:<split>] or
    hub:<id>/<file> (a{1,2}.jsonl: both); synthetic:<train|eval|bench>[/<category>]."""
    format: str = "conversations"
    """conversations (also from/value and OpenAI messages), image (the same about pictures),
    instruction (Alpaca's), prompt (TRL's), humaneval or gsm8k; or as benchmarks word them, see
    docs/bench.md: math, solve, mbpp, livecodebench, swe-bench, mt-bench or alpaca."""
    shuffle: int | None = None
    """Before `skip` and `limit`, put the records in the order that `datasets` gives them with
    shuffle(seed) of this seed; null: as they stand."""
    skip: int = 0
    """Leave out this many conversations at the start."""
    limit: int | None = None
    """Take at most this many conversations after `skip`; null: all."""

    def check(self, key: str) -> None:
        """Refuse what is not valid, by the key under which the source stands."""
        one_of(f"{key}.format", self.format, tuple(FORMATS))
        minimums(self, f"{key}.", shuffle=0, skip=0, limit=1)


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
    """Keep the first so many conversations of `train`, those held out of it included; null: all."""
    max_turns: int | None = None
    """Cut conversations after this many assistant turns; null: keep all."""
    system: str = "keep"
    """A system message: keep; join: put before the words of the first user turn, for targets whose
    chat template knows no system role (Gemma)."""

    def __post_init__(self) -> None:
        allow(self, "data.", system="keep join")
        if self.path == "":
            raise InputError("data=local needs data.path=<file, folder or hub:<id>>")
        safe_name("data.name", self.name, "--")
        one_of("data.format", self.format, tuple(FORMATS))
        for option, usual in (("path", None), ("format", "conversations")):
            value, sources = vars(self)[option], [*self.train, *self.eval]
            if value != usual and value not in [vars(source)[option] for source in sources]:
                raise InputError(
                    f"data.{option}={value} is for data=local; the sources of data={self.name} are "
                    "its own, data.train and data.eval"
                )
        for key in ("train", "eval"):
            for number, source in enumerate(vars(self)[key]):
                source.check(f"data.{key}[{number}]")
        up_to_one(self, "data.", split_eval="[0, 1)")
        only_with(self, "data.", not self.eval, "data.eval=[]", "split_eval")
        minimums(self, "data.", sample_size=1, max_turns=1)


@dataclass
class LearningRates:
    """A loss's own learning rates; `lr_point` picks one."""

    low: float = 5e-5
    """The careful one."""
    mid: float = 1e-4
    """The one a single run takes."""
    high: float = 2e-4
    """The bold one."""

    def __post_init__(self) -> None:
        above_zero(self, "loss.lrs.", "low mid high")


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
        minimums(self, "loss.", **dict.fromkeys(weights, 0))
        ours = self._target_ == LossConfig._target_  # another function may have other knobs
        if ours and self.name != MISSING and not any(weights.values()):
            keys = ", ".join(f"loss.{name}" for name in weights)
            raise InputError(f"at least one loss weight must be above 0: {keys}")
        if ours and self.options:
            raise InputError(
                f"loss.options={self.options} is for a function of your own, which loss._target_ "
                f"names; {self._target_} reads none"
            )
        above_zero(self, "loss.", "temperature")

    def weights(self) -> dict[str, float]:
        """Weight of every term, by the field's name."""
        names = "lambda_ce lambda_hard lambda_rkl beta lambda_tv lambda_lk_alpha lambda_lk"
        return {name: vars(self)[name] for name in names.split()}


@dataclass
class DraftConfig:
    """What every draft has. A subclass beside the draft adds the options of its own.

    The draft `package.Name` has its options in `package.config.NameConfig`, which loads no torch.
    """

    steps_option: ClassVar[str]
    """The option that `steps` follows from."""
    replayed: ClassVar[bool] = False
    """Whether onpolicy=replay can train it."""
    quiet: ClassVar[tuple[str, ...]] = ()
    """Options that a training's numbers do not depend on."""
    defining: ClassVar[tuple[str, ...]] = ()
    """Options that say what its weights mean."""
    unsaid: ClassVar[dict[str, Any]] = {}
    """What options mean of which a training's record says nothing."""

    _target_: str = MISSING
    """Dotted path of the draft's class."""
    name: str = MISSING
    """Short name, part of the run's name."""
    draft_vocab_size: int | None = 32000
    """Rows of the draft's head, the most frequent tokens; null: the target's whole vocabulary."""

    def __post_init__(self) -> None:
        safe_name("draft.name", self.name, ".")
        minimums(self, "draft.", draft_vocab_size=2)

    @property
    def steps(self) -> int:
        """Tokens that a row is trained on, which is how many divisors a window has."""
        raise NotImplementedError

    @property
    def replay_length(self) -> int:
        """Most tokens that onpolicy=replay lets it propose after an anchor."""
        return self.steps

    @property
    def features(self) -> int:
        """Layers of the target that feed it."""
        raise NotImplementedError

    @property
    def confident(self) -> bool:
        """Whether its decoder knows how likely each of its tokens is to stand."""
        return False

    @property
    def formats(self) -> tuple[str, ...]:
        """Of export.format, those in which an engine serves it; auto is the first."""
        return ("sglang",)

    def export_format(self, asked: str) -> str:
        """The layout that export.format means; InputError when no engine serves it in that."""
        if asked != "auto" and asked not in self.formats:
            raise InputError(
                f"export.format={asked}: no engine reads draft={self.name} with these options in "
                f"it; choose one of: auto, {', '.join(self.formats)}"
            )
        return self.formats[0] if asked == "auto" else asked

    @property
    def origin(self) -> str | None:
        """Folder or hub id of a model that it begins as; None: it begins with the target alone."""
        return None

    def chain_length(self, length: int | None) -> int:
        """Tokens drafted per verification, where bench.chain_length says `length`.

        Raises:
            InputError: the draft cannot draft so many.
        """
        return length or 5

    def check_replay(self) -> None:
        """Refuse to be trained on what it proposes, where it cannot."""
        if not self.replayed:
            raise InputError(f"onpolicy cannot train draft={self.name}; use onpolicy=none")

    def check_loss(self, loss: LossConfig) -> None:
        """Refuse a loss of which this draft would leave a part out."""

    def matters(self) -> dict[str, Any]:
        """The options that a training depends on."""
        return {name: value for name, value in vars(self).items() if name not in self.quiet}

    def vocabulary(self, whole: int) -> int:
        """Of so many tokens of the target, how many it can propose.

        Raises:
            InputError: draft_vocab_size, where it matters, is above all of them.
        """
        size = self.draft_vocab_size or whole
        if size > whole and "draft_vocab_size" in self.matters():
            raise InputError(
                f"draft.draft_vocab_size={size} is above the target's vocabulary of {whole}; "
                "draft.draft_vocab_size=null takes all of it"
            )
        return min(size, whole)

    @classmethod
    def recalled(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """The defining options and the target's layers, by their keys, of a training's record."""
        said = {f"draft.{name}": value for name, value in cls.unsaid.items()} | settings
        names = ["model.aux_layers", *(f"draft.{name}" for name in cls.defining)]
        return {name: said[name] for name in names if name in said}


def open_draft() -> Any:
    """The schema's draft: any option may be given, for its class is not known before it is chosen;
    `from_omegaconf` refuses those that it does not have."""
    node = OmegaConf.structured(DraftConfig)
    OmegaConf.set_struct(node, False)
    return node
