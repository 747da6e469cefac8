"""What a training's numbers depend on, beside its tokens and its target."""

from dataclasses import asdict
from operator import attrgetter
from typing import Any

from specforge_exp.config import Config

QUIET = {
    "log_every", "eval_every", "save_every", "keep_last", "keep_best", "resume", "restarts",
    "gpus", "shard", "profile", "dump", "pack_tokens", "gradient_checkpointing", "lrs", "init",
}  # fmt: skip
"""Options of the loss and the trainer that change no number; of the start it is the weights."""

OF_STATES = "target.pack_tokens target.compile"
"""Options that the last digits of the target's states depend on."""


def training_settings(cfg: Config) -> dict[str, Any]:
    """Every option that changes a number of a training, by its key.

    It is what a run's record and its checkpoints hold as `settings`; two trainings of the same
    settings, tokens and target are the same training.
    """
    settings = values_of(cfg, "lr seed epochs max_steps")
    settings |= {f"draft.{key}": value for key, value in cfg.draft.matters().items()}
    settings |= all_but_quiet(cfg, "loss") | all_but_quiet(cfg, "trainer")
    if cfg.onpolicy.replays:
        settings |= {f"onpolicy.{key}": value for key, value in cfg.onpolicy.matters().items()}
    if cfg.target.engine != "transformers":  # all others have the same states
        settings |= values_of(cfg, "target.engine target.args")
    settings |= values_of(cfg, "model.aux_layers")
    return settings | chosen(cfg, f"device model.dtype {OF_STATES}")


def values_of(cfg: Config, names: str) -> dict[str, Any]:
    """These options, by their keys."""
    return {name: attrgetter(name)(cfg) for name in names.split()}


def all_but_quiet(cfg: Config, group: str) -> dict[str, Any]:
    """The options of a node, by their keys, without those of QUIET."""
    options = asdict(vars(cfg)[group]).items()
    return {f"{group}.{key}": value for key, value in options if key not in QUIET}


def chosen(cfg: Config, names: str) -> dict[str, Any]:
    """Those of these options that are chosen: of the others a record says nothing."""
    unchosen: tuple[Any, ...] = (None, False, "auto", {}, [])
    return {k: value for k, value in values_of(cfg, names).items() if value not in unchosen}


def causal_settings(cfg: Config, stage: str) -> dict[str, Any]:
    """As `training_settings`, of a training of the model itself."""
    names = "lr seed epochs max_steps max_length model.init causal.z_loss causal.beta2"
    settings = {"stage": stage, **values_of(cfg, names)}
    if stage == "pretrain":
        settings["pretrain.sources"] = [vars(source) for source in cfg.pretrain.sources]
        settings |= values_of(cfg, "pretrain.eval_documents")
    return settings | chosen(cfg, "device") | all_but_quiet(cfg, "trainer")
