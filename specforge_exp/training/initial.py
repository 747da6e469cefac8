"""Weights that a training begins with: those of another one's checkpoint, or of an export."""

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from specforge_exp import paths
from specforge_exp.artifacts import check
from specforge_exp.config import Config
from specforge_exp.config.checks import typed
from specforge_exp.config.machine import SAME, script
from specforge_exp.drafts.folder import usual_entries
from specforge_exp.drafts.speculators import without_targets
from specforge_exp.drafts.vocabulary import check_mapping
from specforge_exp.errors import InputError
from specforge_exp.target import Target
from specforge_exp.training.checkpoint import check_step, last_step, step_folder

log = logging.getLogger(__name__)

SHAPES = "num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_parameters".split()
"""Entries of config.json that change numbers and no tensor's shape, and are the target's."""


def initial_weights(cfg: Config, init: str) -> Path:
    """The file of weights that trainer.init names.

    Args:
        cfg: the configuration.
        init: a run's folder or name (its last checkpoint; of a run without one its export), a
            step-*/ or an exported folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    folder = Path(init)
    if not folder.is_dir():
        folder = paths.run_dir(cfg).parent / init
    step = last_step(folder) if folder.is_dir() else None
    if step is None and (folder / "export" / "model.safetensors").is_file():
        folder = folder / "export"
    if (folder / "model.safetensors").is_file():
        check(folder, f"{script('export')} export.force=true {SAME}")
        return folder / "model.safetensors"
    if not (folder / "draft.safetensors").is_file():
        if step is None:
            raise InputError(
                f"trainer.init={init} is neither a run with a checkpoint or an export, a step-*/ "
                "of one, nor an exported folder with model.safetensors"
            )
        folder = step_folder(folder, step)
    check_step(folder)
    return folder / "draft.safetensors"


def begin_with(draft: Any, cfg: Config, target: Target) -> None:
    """Put the weights that trainer.init names in a fresh draft, and their vocabulary.

    What the draft calls `optional` may be missing, and stays as it is.

    Raises:
        InputError: they are of another draft, or mean something else.
    """
    file = initial_weights(cfg, str(cfg.trainer.init))
    read = of_checkpoint if file.name == "draft.safetensors" else of_export
    tensors, theirs, ours = read(draft, cfg, target, file.parent)
    refuse_others(f"trainer.init: {file.parent}", theirs, ours)
    own = draft.state_dict()
    absent = tuple(part for part in draft.optional if not any(n.startswith(part) for n in tensors))
    wanted = {name: value for name, value in own.items() if not name.startswith(absent)}
    strange = sorted(
        name
        for name in wanted.keys() | tensors.keys()
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    )
    if strange:
        raise InputError(
            f"trainer.init: {file} is of another draft; different: {', '.join(strange[:5])}"
        )
    if "d2t" in own:
        check_mapping(tensors["d2t"], tensors["t2d"])
        if not tensors["d2t"].equal(own["d2t"].to(tensors["d2t"].device)):
            log.info("train: the draft keeps the vocabulary of trainer.init, not these tokens'")
    # A process that is dealt its weights has none yet.
    held = {name: value for name, value in tensors.items() if not own[name].is_meta}
    draft.load_state_dict(held, strict=False)


def refuse_others(where: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise InputError where what weights were trained to mean is not what a draft means."""
    for key, value in ours.items():
        if key in theirs and theirs[key] != value:
            remedy = f"; give {key}={typed(theirs[key])}" if "." in key else ""
            raise InputError(
                f"{where} has {key}={typed(theirs[key])}, this draft has {typed(value)}{remedy}"
            )


Begun = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]
"""Weights by the draft's names; what they were trained to mean, and what the draft means."""


def of_checkpoint(draft: Any, cfg: Config, target: Target, folder: Path) -> Begun:
    """Of a step-*/, which its run's options explain."""
    try:
        tensors = load_file(folder / "draft.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"trainer.init: {folder} cannot be read: {error}") from None
    mine = {f"draft.{name}": value for name, value in cfg.draft.matters().items()}
    mine["model.aux_layers"] = cfg.model.aux_layers
    records = check_step(folder)["settings"], mine
    theirs, ours = (cfg.draft.recalled(record) for record in records)
    return tensors, theirs, ours


def of_export(draft: Any, cfg: Config, target: Target, folder: Path) -> Begun:
    """Of an exported folder in any layout, which its config.json explains."""
    kind = type(draft)
    if kind.plain is not None and not holds(folder / "model.safetensors", kind.optional):
        kind = kind.plain
    config, tensors = kind.opened(folder, len(target.layers))
    tensors = without_targets(folder, tensors, draft.shared)
    if not (own := draft.written(target, "")):
        return tensors, {}, {}
    theirs, ours = (
        {**read.declared(each), **{name: each[name] for name in SHAPES}}
        for read, each in ((kind, config), (draft, usual_entries(folder, own)))
    )
    return tensors, theirs, ours


def holds(file: Path, parts: tuple[str, ...]) -> bool:
    """Whether a file has weights of these parts; InputError when it cannot be read."""
    try:
        with safe_open(file, "pt") as weights:
            return any(name.startswith(parts) for name in [*weights.keys()])
    except (OSError, SafetensorError) as error:
        raise InputError(f"trainer.init: {file} cannot be read: {error}") from None
