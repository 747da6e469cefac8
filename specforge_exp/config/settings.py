"""What a training's numbers depend on, beside its tokens and its target."""

from dataclasses import asdict
from typing import Any

from specforge_exp.config import Config

QUIET = {
    "log_every", "eval_every", "save_every", "keep_last", "keep_best", "resume", "restarts",
    "gpus", "shard", "profile", "dump", "pack_tokens", "gradient_checkpointing", "lrs",
}  # fmt: skip
"""Options of the loss, the draft and the trainer that change no number."""


def training_settings(cfg: Config) -> dict[str, Any]:
    """Every option that changes a number of a training, by its key.

    It is what a run's record and its checkpoints hold as `settings`; two trainings of the same
    settings, tokens and target are the same training.
    """
    settings = {name: vars(cfg)[name] for name in ("lr", "seed", "epochs", "max_steps")}
    groups = {
        "draft": cfg.draft.matters(),
        "loss": asdict(cfg.loss),
        "trainer": asdict(cfg.trainer),
    }
    for group, node in groups.items():
        settings |= {f"{group}.{key}": value for key, value in node.items() if key not in QUIET}
    return settings | {"model.aux_layers": cfg.model.aux_layers}
