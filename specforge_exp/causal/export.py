"""A checkpoint as a plain Hugging Face folder, which everything else takes as model.path."""

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from specforge_exp import paths
from specforge_exp.artifacts import (
    Fingerprint,
    check,
    differing,
    read_object,
    read_record,
    sha256,
    writing,
)
from specforge_exp.causal.model import Causal, new_model
from specforge_exp.causal.objective import CAUSAL
from specforge_exp.config import Config
from specforge_exp.config.machine import command
from specforge_exp.data.blocks import make_chat
from specforge_exp.data.chat import Chat
from specforge_exp.data.turns import end_of_answers
from specforge_exp.errors import InputError
from specforge_exp.records import write_json
from specforge_exp.target import DTYPES, take_dtype
from specforge_exp.training.checkpoint import (
    OVER,
    last_step,
    read_checkpoint,
    step_folder,
    step_folders,
)
from specforge_exp.training.tracking import best_step

log = logging.getLogger(__name__)


def export_model(cfg: Config, stage: str) -> Path:
    """Export the run's last step, its best one or export.step's; returns the folder.

    Raises:
        InputError: there is no such checkpoint, or none any more for another export.dtype.
    """
    run, folder, own = paths.run_dir(cfg), paths.export_dir(cfg), cfg.export
    step = own.step or (best_step(run, CAUSAL) if own.best else last_step(run, stage))
    record, settings = folder / "run.json", {"export.dtype": own.dtype}
    if not step_folders(run) and record.exists() and not own.force:
        if changes := differing(settings, read_record(record)):
            raise InputError(f"{folder}: {changes[0]}; {run} holds no checkpoint to export as that")
        check(folder, command(stage, OVER, away=False))
        return folder
    if step is None or not step_folder(run, step).exists():
        there = [int(path.name[5:]) for path in step_folders(run)]
        raise InputError(
            f"{stage}: {run} holds no checkpoint of step {step} to export; steps there: {there}"
            + "; trainer.keep_best=true keeps the best one" * own.best
        )
    checkpoint = step_folder(run, step) / "draft.safetensors"
    made_of = Fingerprint({"the checkpoint": sha256(checkpoint)}, settings)
    force = replace(cfg, export=replace(own, force=True))  # the run's last word is what counts
    if record.exists() and not own.force and not made_of.changes(read_record(record)):
        with suppress(InputError):  # what is damaged is written again
            check(folder, "")
            return folder
    weights = read_checkpoint(step_folder(run, step), f"{OVER} ", stage).draft
    with writing(folder, made_of, force, "export", counts={"step": step}) as partial:
        save_model(partial, cfg, weights, stage)
    log.info("%s: exported step %d: %s", stage, step, folder)
    return folder


def save_model(folder: Path, cfg: Config, weights: dict[str, Tensor], stage: str) -> None:
    """Write weights, rounded to export.dtype, with model.path's configuration and tokenizer."""
    path = cfg.model.path
    causal = Causal(new_model(replace(cfg.model, init="random"), 0), cfg.causal)
    causal.load_state_dict(weights)
    model = causal.model
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:  # it has none
            log.debug("%s has no generation_config.json", path)
    take_dtype(model, DTYPES[cfg.export.dtype])
    model.save_pretrained(folder)
    if stage == "sft":
        stop_behind_answers(folder / "generation_config.json", make_chat(cfg))
    AutoTokenizer.from_pretrained(path, trust_remote_code=False).save_pretrained(folder)


def stop_behind_answers(file: Path, chat: Chat) -> None:
    """Make the chat template's end of an answer an end token, if it is none yet: a model that has
    learnt answers writes it, and the configuration of a base model does not say so.

    In the file, as transformers refuses to write a changed configuration that it finds fault with.
    """
    end = end_of_answers(chat)
    if end is None or end in chat.stops:
        return
    ends = [chat.tokenizer.convert_tokens_to_ids(end), *sorted(chat.eos)]
    write_json(file, {**(read_object(file) if file.exists() else {}), "eos_token_id": ends})
    log.info("sft: the export stops at %s, with which its chat template ends answers", end)
