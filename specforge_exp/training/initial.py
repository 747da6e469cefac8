"""Weights that a training begins with: those of another one's checkpoint or export."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from specforge_exp import paths
from specforge_exp.artifacts import SAME, check
from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.training.checkpoint import check_step, last_step, step_folder


def initial_weights(cfg: Config, init: str) -> Path:
    """The file of weights that trainer.init names.

    Args:
        cfg: the configuration.
        init: a run's folder or name (its last checkpoint), a step-*/ or an exported folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    folder = Path(init)
    if not folder.is_dir():
        folder = paths.run_dir(cfg).parent / init
    if (folder / "model.safetensors").is_file():
        check(folder, f"python export.py export.force=true {SAME}")
        return folder / "model.safetensors"
    if not (folder / "draft.safetensors").is_file():
        step = last_step(folder) if folder.is_dir() else None
        if step is None:
            raise InputError(
                f"trainer.init={init} is neither a run with a checkpoint, a step-*/ of one, nor an "
                "exported folder with model.safetensors"
            )
        folder = step_folder(folder, step)
    check_step(folder)
    return folder / "draft.safetensors"


def begin_with(draft: nn.Module, file: Path) -> None:
    """Put these weights in a fresh draft.

    Raises:
        InputError: they are of another draft, or of another vocabulary than its tokens.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"trainer.init: {file} cannot be read: {error}") from None
    own = draft.state_dict()
    strange = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if strange:
        raise InputError(
            f"trainer.init: {file} is of another draft; different: {', '.join(strange[:5])}"
        )
    for name in ("d2t", "t2d"):
        if name in own and not own[name].equal(tensors[name]):
            raise InputError(
                f"trainer.init: {file} has another vocabulary than these tokens ({name}); train on "
                "the tokens that it was trained on"
            )
    draft.load_state_dict(tensors)
