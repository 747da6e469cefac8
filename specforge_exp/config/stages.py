"""How the stages work: tracker, paths and one node per stage."""

import re
from dataclasses import dataclass, field

from specforge_exp.config.checks import (
    SWITCHED,
    above_zero,
    allow,
    at_least,
    minimums,
    one_of,
    only_with,
    safe_name,
    shared_evenly,
    up_to_one,
)
from specforge_exp.config.choices import Source
from specforge_exp.errors import InputError


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    name: str = "none"
    """none, wandb (offline when no key is found) or trackio (on this machine)."""
    project: str = "specforge-eagle3-opd"
    """Project of the tracker."""
    entity: str | None = None
    """wandb: the user or team; null: the account's own."""
    group: str | None = None
    """Group of the runs; null: none."""
    run_name: str | None = None
    """Name of the run there; null: `prefix` and the run's own."""
    prefix: str = ""
    """Put before run_name to name the run there."""
    secrets: dict[str, list[str]] = field(default_factory=dict)
    """Modal secrets with its key: name of the secret: keys."""

    def __post_init__(self) -> None:
        allow(self, "tracker.", name="none wandb trackio")
        if self.entity and self.name == "trackio":
            raise InputError("tracker.entity is for tracker=wandb; trackio stays on this machine")


@dataclass
class PathsConfig:
    """The two roots of all artifacts."""

    datasets: str = "artifacts/datasets"
    """Prompts, regenerated conversations and token files."""
    checkpoints: str = "artifacts/checkpoints"
    """Runs: metrics, checkpoints, exports, bench results."""


@dataclass
class PrepConfig:
    """python prep.py"""

    check: bool = False
    """Only say whether the data set is there, how large it is and whether its inputs changed."""
    force: bool = False
    """Make it again even if it is complete."""


@dataclass
class RegenConfig:
    """python regen.py"""

    temperature: float | None = 0.7
    """Sampling temperature; 0: greedy; null: what the model's generation config says."""
    top_p: float | None = None
    """Nucleus sampling; 1: off; null: what the model's generation config says."""
    top_k: int | None = None
    """Only the so many most likely tokens; 0: off; null: as the generation config says."""
    repetition_penalty: float | None = None
    """Above 1: what has been said becomes less likely; 1: off; null: as the generation config
    says."""
    max_tokens: int = 4096
    """Most new tokens of one answer."""
    thinking: str = "model"
    """off: the model does not think; on: it does, and its thoughts are left out of the record;
    kept: they are recorded as reasoning_content; model: as model.chat_template_kwargs says."""
    truncated: str = "keep"
    """Answers cut at max_tokens: keep; drop (the conversation ends before them); retry (once, with
    twice max_tokens)."""
    num_samples: int | None = None
    """Process the first so many conversations of each split, the others are skipped; null: all."""
    samples_per_prompt: int = 1
    """Answers to each conversation; above 1 their ids end in #0, #1, ..."""
    chunk_size: int = 256
    """Conversations dealt out together: those with the same beginning."""
    drain: float = 15.0
    """Seconds that answers under way get to end after SIGTERM or Ctrl-C."""
    dry_run: bool = False
    """Print what would be done, and on which servers; start nothing."""
    status: bool = False
    """`python regen.py status`: print how far it is, do nothing."""
    force: bool = False
    """Make it again even if it is complete."""

    def __post_init__(self) -> None:
        self.thinking = SWITCHED.get(self.thinking, self.thinking)
        allow(self, "regen.", thinking="model off on kept", truncated="keep drop retry")
        above_zero(self, "regen.", "repetition_penalty")
        minimums(
            self, "regen.", temperature=0, top_k=0, max_tokens=1, num_samples=1,
            samples_per_prompt=1, chunk_size=1, drain=0,
        )  # fmt: skip
        up_to_one(self, "regen.", top_p="(0, 1]")


@dataclass
class PreprocessConfig:
    """python preprocess.py"""

    source: str = "regen"
    """regen: the target's own answers; prep: the answers that came with the data."""
    overlong: str = "truncate"
    """A conversation above max_length is cut (truncate), left out (drop) or refused (error)."""
    last_turn_only: bool = False
    """Supervise the last answer only."""
    changed_turns: str = "apart"
    """An answer that the template shows otherwise in the whole conversation than when it was
    written (most templates leave out earlier thoughts): apart: it is trained on in a sequence of
    its own, with all that stood before it; leave_out: it is not supervised."""
    thinking: str = "in"
    """Thoughts (reasoning_content, reasoning, thinking, or <think>...</think> in an answer): in:
    supervised as the model writes them; out: taken out of the conversation."""
    processes: int | None = None
    """Processes that encode; null: one per CPU that may be used. Changes no byte."""
    shard_tokens: int = 50_000_000
    """Tokens per shard, about."""
    force: bool = False
    """Make it again even if it is complete."""

    def __post_init__(self) -> None:
        allow(
            self, "preprocess.", source="regen prep", overlong="truncate drop error",
            thinking="in out", changed_turns="apart leave_out",
        )  # fmt: skip
        minimums(self, "preprocess.", processes=1, shard_tokens=1)


@dataclass
class TrainerConfig:
    """python train.py"""

    batch_size: int = 1
    """Conversations per forward, over all GPUs: the number of GPUs changes no number."""
    accumulate: int = 1
    """Forwards per optimiser step."""
    pack_tokens: int | None = None
    """Lay the batch_size * accumulate conversations of a step into as few forwards of at most this
    many tokens per GPU as possible; null: into `accumulate` forwards. Changes no number."""
    gpus: int | str = 1
    """Processes on this machine, one per GPU (on a CPU: processes over gloo); auto: as many of its
    GPUs as share batch_size evenly, without a GPU 1."""
    shard: bool = False
    """Share the draft's weights, gradients and moments among the processes (FSDP2) instead of
    keeping a replica in each: less memory, more traffic. Changes no number."""
    gradient_checkpointing: bool = False
    """Compute every unroll step again in the backward pass: less memory, about a tenth more time.
    Changes no number."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine, linear, constant or wsd (constant, then a decay)."""
    warmup_ratio: float = 0.015
    """Share of all steps in which the learning rate rises linearly."""
    decay_ratio: float = 0.2
    """wsd: share of all steps at the end in which it falls."""
    decay_shape: str = "linear"
    """wsd: linear or cosine."""
    min_lr_ratio: float = 0.0
    """The schedule, if it is not constant, ends at this share of lr."""
    weight_decay: float = 0.0
    """AdamW's."""
    clip: float = 0.5
    """Largest global gradient norm."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 500
    """Steps between evaluations on held-out conversations; there is always one at the end."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    profile: list[int] = field(default_factory=list)
    """[start, steps]: torch.profiler over so many steps after the start-th, for each process a
    trace in the run's folder, profile/; []: none."""
    dump: list[int] = field(default_factory=list)
    """Steps before which weights and all that they are trained on go to the run's folder, dump/,
    for each process; []: none."""
    init: str | None = None
    """train: begin with the weights of a checkpoint (a run's folder or name, or its step-*/) or of
    an exported folder, with a fresh optimiser; null: with a fresh draft."""
    keep_best: bool = False
    """Also save and keep the evaluation with the longest simulated accepted length, of a causal
    model with the lowest loss."""
    resume: bool = True
    """Continue from the newest checkpoint of this run; false: start over."""
    restarts: int = 0
    """Times that the processes of trainer.gpus are started again when one of them dies, from the
    newest checkpoint; workers of target.placement=ray go on meanwhile."""

    def __post_init__(self) -> None:
        minimums(
            self, "trainer.", restarts=0, batch_size=1, accumulate=1, pack_tokens=1,
            log_every=1, eval_every=1, save_every=1, keep_last=1, weight_decay=0,
        )  # fmt: skip
        ratios = ("warmup_ratio", "decay_ratio", "min_lr_ratio")
        up_to_one(self, "trainer.", **dict.fromkeys(ratios, "[0, 1]"))
        allow(self, "trainer.", schedule="cosine linear constant wsd", decay_shape="linear cosine")
        wsd = self.schedule == "wsd"
        only_with(self, "trainer.", wsd, "trainer.schedule=wsd", "decay_ratio decay_shape")
        if wsd and self.warmup_ratio + self.decay_ratio > 1:
            raise InputError(
                f"trainer.warmup_ratio={self.warmup_ratio} and trainer.decay_ratio="
                f"{self.decay_ratio} leave no step between them; their sum must be at most 1"
            )
        above_zero(self, "trainer.", "clip")
        if self.profile and (len(self.profile) != 2 or self.profile[0] < 0 or self.profile[1] < 1):
            raise InputError(f"trainer.profile={self.profile} is not [start, steps], e.g. [10,3]")
        for step in self.dump:
            at_least("trainer.dump", step, 1)
        if isinstance(self.gpus, int):
            minimums(self, "trainer.", gpus=1)
            shared_evenly(self.batch_size, self.gpus, "trainer.gpus")
        elif self.gpus != "auto":
            raise InputError(f"trainer.gpus={self.gpus} is not valid; it is a number, or auto")


@dataclass
class ExportConfig:
    """python export.py"""

    step: int | None = None
    """The checkpoint to export; null: the last of the run, or the best (see `best`)."""
    best: bool = False
    """Export the checkpoint that trainer.keep_best kept."""
    dtype: str = "bfloat16"
    """Weights in the exported file: bfloat16 or float32."""
    format: str = "auto"
    """config.json and names as SGLang and z-lab's code read them, and vLLM too (sglang), or those
    of the package speculators, which vLLM also starts by itself (speculators); auto: sglang."""
    source: str | None = None
    """`python export.py from=`: folder or hub id of a draft in either format, which becomes the
    run's export with its weights as they are; null: a checkpoint of the run."""
    push: str | None = None
    """owner/name: also upload the draft, with a model card, to this repository of the hub."""
    private: bool = True
    """export.push: only its owner sees a repository that this makes."""
    dry_run: bool = False
    """export.push: print the card and what would be uploaded; upload nothing."""
    force: bool = False
    """Make it again even if it is complete."""

    def __post_init__(self) -> None:
        allow(self, "export.", dtype="bfloat16 float32", format="auto sglang speculators")
        if self.source is not None and (self.step or self.best):
            raise InputError(
                f"export.source={self.source} is a draft that is there already; export.step and "
                "export.best choose a checkpoint of the run"
            )
        if self.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise InputError(f"export.push={self.push} is not the owner/name of a repository")
        pushed = "export.push=<owner>/<name>"
        only_with(self, "export.", self.push is not None, pushed, "dry_run private")
        minimums(self, "export.", step=1)
        if self.step and self.best:
            raise InputError(f"export.step={self.step} and export.best=true name two checkpoints")


@dataclass
class BenchConfig:
    """python bench.py"""

    datasets: dict[str, Source] = field(default_factory=dict)
    """The prompts, by data set; empty: the run's held-out conversations."""
    name: str = ""
    """The suite's name: the file is bench-<name>.json, or bench.json without one."""
    suite: dict[str, Source] = field(default_factory=dict)
    """The data sets of bench=standard and bench=zlab; where there are any, `datasets` is not
    read."""
    only: list[str] = field(default_factory=list)
    """Of the suite, these; empty: all."""
    samples: str = "auto"
    """hub: the suite's prompts; shipped: the few of our own writing in assets/bench; auto: the
    hub's, or the shipped ones where not all of the hub's can be had."""
    turns: str = "first"
    """What is asked of a conversation: its first turn, or all of them, each after the model's own
    answer to the one before."""
    average: str = "conversations"
    """tau of a data set: conversations: the mean over them of tokens per verification; responses:
    as z-lab's script counted for the DFlash paper, the mean over answers, where the last
    verification counts in full although the answer ended in it."""
    thinking: str = "model"
    """off, on, or model: as model.chat_template_kwargs says."""
    max_length: int | None = None
    """Tokens of a prompt and its answer, at most; null: the run's max_length."""
    chain_length: int | None = None
    """Tokens drafted per verification; null: 5, or all that a draft guesses in one pass (the rest
    of a block, P-EAGLE's depths)."""
    verify: str = "all"
    """all: every drafted token is verified; confidence: a draft with a confidence head ends a chain
    where one more token is expected to earn less than it costs."""
    verify_cost: float = 0.05
    """bench.verify=confidence: what one more token in a verification costs, in verifications of a
    single token."""
    max_tokens: int = 64
    """Most new tokens of one answer."""
    temperature: float = 0.0
    """0: greedy, compared token for token with the target alone."""
    dtype: str = "float32"
    """float32 (exact comparison) or bfloat16."""
    bootstrap: int = 2000
    """Resamples behind the 95 % interval."""
    concurrency: int = 1
    """engine=sglang, vllm, openai: conversations under way at a time."""
    alone: bool = True
    """engine=sglang, vllm: also answer with the target alone, for speed-ups and a comparison."""
    alone_url: str | None = None
    """engine=openai: a server of the target alone, for the same; null: none."""
    force: bool = False
    """Measure again even if bench.json is complete."""

    def __post_init__(self) -> None:
        minimums(
            self, "bench.", chain_length=1, max_tokens=2, max_length=3, temperature=0,
            bootstrap=1, concurrency=1, verify_cost=0,
        )  # fmt: skip
        self.thinking = SWITCHED.get(self.thinking, self.thinking)
        allow(
            self, "bench.", dtype="float32 bfloat16", samples="auto hub shipped",
            turns="first all", average="conversations responses", thinking="model off on",
            verify="all confidence",
        )  # fmt: skip
        confident = self.verify == "confidence"
        only_with(self, "bench.", confident, "bench.verify=confidence", "verify_cost")
        only_with(self, "bench.", bool(self.suite), "bench=standard or bench=zlab", "samples only")
        safe_name("bench.name", self.name or "none")
        for key in ("datasets", "suite"):
            for name, source in vars(self)[key].items():
                safe_name(f"bench.{key}", name)
                source.check(f"bench.{key}.{name}")
        for name in self.only:
            one_of("bench.only", name, tuple(self.suite))


@dataclass
class ReportConfig:
    """python report.py"""

    metric: str = "simulated_length"
    """What runs are ranked by: accepted_length (of bench), or a value of the last evaluation, e.g.
    simulated_length, loss or alpha/0. Losses and costs are better when smaller. As it is, bench's
    jobs are ranked by accepted_length, pretrain's and sft's by loss."""
    resamples: int = 2000
    """Resamples behind the 95 % intervals."""

    def __post_init__(self) -> None:
        minimums(self, "report.", resamples=1)
