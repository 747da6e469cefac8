"""The typed configuration that every stage shares.

Hydra composes `conf/` against `Config`, so a misspelt key or a wrong type is refused by name.
`from_omegaconf` turns the result into plain objects; rules that span fields live in
`__post_init__` and name the fields.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from specforge_exp.config.causal import CausalConfig, PretrainConfig
from specforge_exp.config.chat import ChatConfig
from specforge_exp.config.checks import (
    above_zero,
    allow,
    check_objectives,
    finite,
    minimums,
    only_with,
    refuse_others,
    safe_name,
)
from specforge_exp.config.choices import (
    DataConfig,
    DraftConfig,
    LossConfig,
    ModelConfig,
    Source,
    open_draft,
)
from specforge_exp.config.engine import EngineConfig
from specforge_exp.config.keys import not_an_option
from specforge_exp.config.onpolicy import OnPolicyConfig
from specforge_exp.config.resolvers import REPOSITORY, STAGES, register, repository
from specforge_exp.config.stages import (
    BenchConfig,
    ExportConfig,
    PathsConfig,
    PrepConfig,
    PreprocessConfig,
    RegenConfig,
    ReportConfig,
    TrackerConfig,
    TrainerConfig,
)
from specforge_exp.config.target import TargetConfig
from specforge_exp.errors import InputError, first_line

__all__ = [
    "REPOSITORY",
    "STAGES",
    "ChatConfig",
    "DataConfig",
    "DraftConfig",
    "EngineConfig",
    "InputError",
    "LossConfig",
    "ModelConfig",
    "PathsConfig",
    "RegenConfig",
    "ReportConfig",
    "Source",
    "TargetConfig",
    "TrainerConfig",
    "repository",
]

register()


def open_node() -> Any:
    """A mapping that takes any key from the command line."""
    return OmegaConf.create({}, flags={"struct": False})


@dataclass
class Config:
    """Everything a run depends on; the fields at the top are those people type."""

    run_name: str = MISSING
    """Folder of the run under paths.checkpoints."""
    output_prefix: str = ""
    """Before every run_name and sweep_name that conf/ makes, e.g. eagle3-opd_."""
    run: Any = None
    """report: a run by its name or folder, or several ([one,other]), instead of a sweep."""
    sweep_name: str = "sweep"
    """Folder of multiruns' records under paths.checkpoints/sweeps, one below it per script."""
    sweep: str | None = None
    """report, bench: the folder of a multirun, to report on or to bench as a whole; null: none."""
    lr: float = 1e-4
    """Peak learning rate; by default the loss's own `lrs` at `lr_point`."""
    lr_point: str = "mid"
    """low, mid or high: which of the loss's own learning rates."""
    seed: int = 0
    """Draft initialisation, order of the data, sampling."""
    seeds: int = 1
    """With -m: repeat every run of a grid with so many seeds, counted up from `seed`."""
    objectives: list[str] = field(default_factory=lambda: ["simulated_length"])
    """What train returns, for a study: simulated_length, loss, alpha, top1 (or alpha/0, the first
    unroll step's) of its last evaluation, gpu_hours (of trainers, and of the target's workers)."""
    epochs: int = 10
    """Passes over the training conversations."""
    max_steps: int | None = None
    """Stop after this many optimiser steps; null: after `epochs`."""
    max_length: int = 2048
    """Tokens of one conversation, at most."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda."""
    threads: int | None = None
    """CPU threads of torch; null: its own choice. Where they wait for each other they sleep, unless
    your OMP_WAIT_POLICY says otherwise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    draft: DraftConfig = field(default_factory=open_draft)
    engine: EngineConfig = field(default_factory=EngineConfig)
    onpolicy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    prep: PrepConfig = field(default_factory=PrepConfig)
    regen: RegenConfig = field(default_factory=RegenConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    resources: dict[str, Any] = field(default_factory=open_node)
    """What a job runs on when a launcher sends it elsewhere. The keys are the launcher's, which
    refuses those it does not have; `env` and `volumes` are read here too."""

    def __post_init__(self) -> None:
        finite("", self)
        safe_name("run_name", self.run_name)
        safe_name("sweep_name", self.sweep_name)
        if self.run_name.lower() == "sweeps":
            raise InputError(f"run_name={self.run_name} is the folder of all sweeps' records")
        allow(self, "", lr_point="low mid high", device="auto cpu cuda")
        if self.bench_engine == "transformers" and self.bench.concurrency > 1:
            raise InputError(
                f"bench.concurrency={self.bench.concurrency} needs engine=sglang, vllm or openai; "
                f"with engine.name={self.engine.name} bench answers one prompt at a time"
            )
        started, given = self.bench_engine in ("sglang", "vllm"), self.bench_engine == "openai"
        only_with(self.bench, "bench.", started, "engine=sglang or vllm", "alone")
        only_with(self.bench, "bench.", given, "engine=openai", "alone_url")
        above_zero(self, "", "lr")
        if self.lr_point != "mid" and self.lr != (rate := vars(self.loss.lrs)[self.lr_point]):
            raise InputError(
                f"lr_point={self.lr_point} is lr={rate:g} with loss={self.loss.name}, and lr="
                f"{self.lr:g} is given, by the command or its experiment; leave lr_point out, or "
                f"give 'lr=${{loss.lrs.{self.lr_point}}}'"
            )
        minimums(self, "", epochs=1, max_steps=1, max_length=2, threads=1, seeds=1, seed=0)
        if isinstance(self.draft, DraftConfig):  # what only serves the target has none
            self.check_draft()
            if self.onpolicy.replays:
                self.check_onpolicy()
        if self.target.alone != "none":
            self.check_alone()

    def check_draft(self) -> None:
        """Refuse what the draft cannot do."""
        self.draft.chain_length(self.bench.chain_length)
        self.draft.export_format(self.export.format)
        self.draft.check_loss(self.loss)
        if self.bench.verify == "confidence" and not self.draft.confident:
            raise InputError(
                f"bench.verify=confidence: draft={self.draft.name} has no confidence head; "
                "bench.verify=all is for every draft"
            )
        if self.bench.verify == "confidence" and self.bench_engine != "transformers":
            raise InputError(
                f"bench.verify=confidence is for this process's decoder; engine.name="
                f"{self.engine.name} decides by itself how much it verifies"
            )
        check_objectives(self.objectives, self.draft.steps)
        option = self.draft.steps_option
        if self.max_length < self.draft.steps + 2:
            raise InputError(
                f"max_length={self.max_length} leaves nothing to learn for draft.{option}="
                f"{vars(self.draft)[option]}; it needs {self.draft.steps + 2} tokens"
            )
        layers, features = self.model.aux_layers, self.draft.features
        if layers is not None and len(layers) != features:
            raise InputError(
                f"model.aux_layers={layers} names {len(layers)} layers; draft={self.draft.name} is "
                f"fed by {features}"
            )

    def check_onpolicy(self) -> None:
        """Refuse what replay cannot go with: the target must run, with the draft whole."""
        self.draft.check_replay()
        whole = (
            "target.alone target.cache target.engine target.share target.shard target.pack_tokens "
            "target.compile trainer.shard"
        )
        here = " target.placement" * self.onpolicy.rolls
        why = "every process asks its own target to judge what its draft has just proposed"
        refuse_others(f"onpolicy={self.onpolicy.name}", self, whole + here, why)
        length, steps = self.onpolicy.length, self.draft.replay_length
        if length is not None and length > steps:
            raise InputError(
                f"onpolicy.length={length} is above the {steps} tokens that "
                f"draft.{self.draft.steps_option}={vars(self.draft)[self.draft.steps_option]} is "
                "trained on"
            )

    def check_alone(self) -> None:
        """Refuse what one side alone cannot go with: it neither reads a run nor leaves one."""
        of_runs = (
            "target.share target.dry_run target.profile trainer.resume trainer.restarts "
            "trainer.profile trainer.dump"
        )
        why = "it is no run, and reads and writes none"
        refuse_others(f"target.alone={self.target.alone}", self, of_runs, why)

    @property
    def keeps_nothing(self) -> bool:
        """Whether train only shows what it would do, or tries one side of it."""
        return self.target.dry_run or self.onpolicy.dry_run or self.target.alone != "none"

    @property
    def bench_engine(self) -> str:
        """What answers bench: the engine where that is a server here, else transformers."""
        served = self.engine.name in ("sglang", "vllm", "openai")
        return self.engine.name if served else "transformers"

    @property
    def bench_alone(self) -> bool:
        """Whether bench also asks the target alone."""
        if self.bench_engine == "openai":
            return self.bench.alone_url is not None
        return self.bench.alone

    @property
    def chain_length(self) -> int:
        """Tokens that bench drafts per verification."""
        return self.draft.chain_length(self.bench.chain_length)


@cache
def schema() -> Any:
    """All options with their types, to be merged into: making it takes as long as a merge."""
    return OmegaConf.structured(Config)


def from_omegaconf(cfg: DictConfig) -> Config:
    """Resolve what Hydra composed into a `Config`; raises InputError for what does not fit."""
    if missing := valueless(OmegaConf.to_container(cfg)):
        raise InputError(missing)
    try:
        # A launcher's copy without Hydra's node has forgotten its type.
        typed = OmegaConf.merge(schema(), cfg)
        typed.draft = draft_options(typed.draft)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise InputError(first_line(error)) from None
    assert isinstance(config, Config)
    return config


def valueless(content: Any) -> str:
    """Which options have to be given, also those that others are made of; "": all are there."""

    def lacking(node: Any, at: str) -> list[str]:
        parts = dict(enumerate(node)) if isinstance(node, list) else node
        if not isinstance(parts, dict):
            return [f"{at[1:]}=..."] * (node == MISSING)
        return [key for name, part in parts.items() for key in lacking(part, f"{at}.{name}")]

    listed = ", ".join(sorted(key for key in lacking(content, "") if not key.startswith("hydra.")))
    what = "these options have no value; give them on the command line or in their group's file: "
    return listed and what + listed


def draft_options(draft: DictConfig) -> DictConfig:
    """The draft's node with the types of its own options; InputError for one it does not have."""
    kind = draft_config_class(draft._target_)
    options = OmegaConf.to_container(draft, resolve=True)
    assert isinstance(options, dict)
    for key in options:
        if problem := not_an_option(["draft", str(key)], kind):
            raise InputError(problem)
    try:
        typed = OmegaConf.merge(kind, options)
    except OmegaConfBaseException as error:
        raise InputError(f"draft.{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(typed, DictConfig)
    return typed


def draft_config_class(target: str) -> type[DraftConfig]:
    """The class of the options of the draft that `_target_` names, found without loading torch."""
    package, _, name = target.rpartition(".")
    kind = locate(f"{package}.config.{name}Config")
    if not (isinstance(kind, type) and issubclass(kind, DraftConfig)):
        raise InputError(f"{package}.config.{name}Config is not a subclass of DraftConfig")
    return kind


def check_job(cfg: DictConfig) -> None:
    """What resources.validate names: raises InputError for a job that a container cannot run.

    Besides `from_omegaconf`: a path that is written out means a place on the launching machine,
    and what a container writes outside its Volumes is lost.
    """
    config = from_omegaconf(cfg)
    volumes, extras = config.resources["volumes"], config.resources["image"].get("extras", [])
    options = config.target
    if options.store == "mooncake":
        raise InputError(
            "target.store=mooncake is for several machines of your own, a job has one container: "
            "target.store=ray"
        )
    if options.placement == "ray" and "ray" not in extras:
        raise InputError(
            "target.placement=ray needs Ray in the containers: resources.image.extras="
            f"[{','.join([*extras, 'ray'])}]"
        )
    if options.share == "sweep":
        raise InputError(
            "target.share=sweep is for runs of one machine, and each job has a container of "
            "its own: target.share=none"
        )
    if options.engine == "vllm" and not options.python:
        raise InputError(
            "target.engine=vllm: the containers' own Python has no vLLM; make an image with one "
            "beside it (resources.image) and name that: target.python=..."
        )
    written = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(written, dict)
    for root in ("datasets", "checkpoints"):
        path = written["paths"][root]
        mounted = any(Path(path).is_relative_to(mount) for mount in volumes)
        if "${" not in path and not mounted:
            raise InputError(
                f"paths.{root}={path} lies on none of the Volumes in resources.volumes, so nothing "
                f"written there would be kept; SPECFORGE_{root.upper()}={path} in the environment "
                "moves the folder here and leaves the container's alone"
            )
    model = written["model"]["path"]
    if "${" not in model and Path(model).expanduser().is_dir():
        raise InputError(
            f"model.path={model} is a folder of this machine, which a container does not have; "
            "give a hub id, or a path on a Volume in resources.volumes"
        )


def locate(dotted: str, group: str = "draft.") -> Any:
    """Import the `package.module.name` of a group's _target_; InputError when there is none."""
    try:
        return resolve_name(dotted)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{group}_target_={dotted} cannot be imported ({first_line(error)}); a file of this "
            "folder is found with PYTHONPATH=. before the command"
        ) from None
