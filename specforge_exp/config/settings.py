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
    settings = {name: vars(cfg)[name] for name in ("lr", "seed", "epochs", "max_steps")}
    settings |= {f"draft.{key}": value for key, value in cfg.draft.matters().items()}
    for group, node in {"loss": asdict(cfg.loss), "trainer": asdict(cfg.trainer)}.items():
        settings |= {f"{group}.{key}": value for key, value in node.items() if key not in QUIET}
    if cfg.onpolicy.replays:
        settings |= {f"onpolicy.{key}": value for key, value in cfg.onpolicy.matters().items()}
    if cfg.target.engine != "transformers":  # all others have the same states
        settings |= {f"target.{key}": vars(cfg.target)[key] for key in ("engine", "args")}
    settings["model.aux_layers"] = cfg.model.aux_layers
    return settings | chosen(cfg, f"device model.dtype {OF_STATES}")


def chosen(cfg: Config, names: str) -> dict[str, Any]:
    """Those of these options that are chosen: of the others a record says nothing."""
    values = {name: attrgetter(name)(cfg) for name in names.split()}
    unchosen: tuple[Any, ...] = (None, False, "auto", {}, [])
    return {name: value for name, value in values.items() if value not in unchosen}


def causal_settings(cfg: Config, stage: str) -> dict[str, Any]:
    """As `training_settings`, of a training of the model itself."""
    names = ("lr", "seed", "epochs", "max_steps", "max_length")
    settings: dict[str, Any] = {name: vars(cfg)[name] for name in names}
    settings |= {"stage": stage, "model.init": cfg.model.init}
    settings |= {f"causal.{name}": vars(cfg.causal)[name] for name in ("z_loss", "beta2")}
    if stage == "pretrain":
        settings["pretrain.sources"] = [vars(source) for source in cfg.pretrain.sources]
        settings["pretrain.eval_documents"] = cfg.pretrain.eval_documents
    kept = {f"trainer.{k}": v for k, v in asdict(cfg.trainer).items() if k not in QUIET}
    return settings | chosen(cfg, "device") | kept
