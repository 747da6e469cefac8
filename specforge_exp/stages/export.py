"""export: a checkpoint -> the folder that SGLang and vLLM load.

Reads checkpoints/<run_name>/step-*/; writes checkpoints/<run_name>/export/, which is reloaded and
compared with the trained draft before it says done. It is of one checkpoint, by its digest: after
another training under the same name it is refused, not reused.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specforge_exp import paths
from specforge_exp.artifacts import (
    SAME,
    Fingerprint,
    check,
    commands,
    model_digest,
    reusable,
    sha256,
    writing,
)
from specforge_exp.config import Config, locate
from specforge_exp.data.tokens import read_split
from specforge_exp.errors import InputError
from specforge_exp.serving.publishing import model_card, publish
from specforge_exp.target import DTYPES, Target, load_target, set_up_torch
from specforge_exp.training.checkpoint import (
    OVER,
    Checkpoint,
    last_step,
    read_checkpoint,
    step_folder,
    step_folders,
)
from specforge_exp.training.tracking import best_step

log = logging.getLogger(__name__)

LAYOUT = 2
"""Of exported folders: raised whenever the same checkpoint is written in another way."""


def export(cfg: Config) -> Path:
    """Export the run's draft, and upload it with export.push; returns the folder."""
    folder = exported(cfg)
    if cfg.export.push:
        kind, length = locate(cfg.draft._target_), cfg.chain_length
        served = kind.sglang_options(length), kind.vllm_options(length)
        card = model_card(cfg, paths.run_dir(cfg), *served)
        files = [folder / "config.json", folder / "model.safetensors"]
        publish(cfg.export, files, card)
    return folder


def exported(cfg: Config) -> Path:
    """Export the run's draft, unless it is there."""
    folder = paths.export_dir(cfg)
    checkpoint = chosen_checkpoint(cfg)
    if checkpoint.record["inputs"]["the target"] != model_digest(cfg.model.path):
        raise InputError(
            f"{paths.run_dir(cfg)} holds a checkpoint of another target than "
            f"model.path={cfg.model.path}; name the model it was trained with"
        )
    step = step_folder(paths.run_dir(cfg), checkpoint.step)
    fingerprint = Fingerprint(
        {**checkpoint.record["inputs"], "the checkpoint": sha256(step / "draft.safetensors")},
        {"export.dtype": cfg.export.dtype, "step": checkpoint.step, "layout": LAYOUT},
    )
    if reusable(folder / "run.json", fingerprint, cfg.export.force, "export"):
        return folder
    device = set_up_torch(cfg)
    kind = locate(cfg.draft._target_)
    feeds = partial(kind.target_layers, cfg.draft)
    target = load_target(cfg.model, device, cfg.model.dtype, feeds=feeds)
    draft = kind.restored(target, cfg.draft, checkpoint.draft).to(device)
    dtype = DTYPES[cfg.export.dtype]
    with writing(folder, fingerprint, cfg, "export") as unfinished:
        draft.write(unfinished, target, cfg.model.path, dtype)
        agreement = compare(cfg, draft, kind.load(unfinished, target).to(device), target, dtype)
    log.info(
        "export: complete: %s: step %d, reloaded with equal logits; rounding to %s keeps %.2f %% "
        "of the draft's choices", folder, checkpoint.step, cfg.export.dtype, 100 * agreement,
    )  # fmt: skip
    return folder


def chosen_checkpoint(cfg: Config) -> Checkpoint:
    """The checkpoint that export.step names, the best, or the last: never another in its place.

    Raises:
        InputError: it is gone or damaged; names it, the others that are there and the command that
            makes it again.
    """
    run, options, over = paths.run_dir(cfg), cfg.export, f"python train.py {OVER} {SAME}"
    steps = [int(folder.name[5:]) for folder in step_folders(run)]
    if not steps:
        command = over if (run / "run.json").exists() else commands(cfg, "train")
        raise InputError(f"{run} holds no checkpoint; make one with: {command}")
    if options.step and options.step not in steps:
        raise InputError(f"{step_folder(run, options.step)} does not exist; steps there: {steps}")
    if options.best:
        check(run, over)
    last = None if options.step else last_step(run)
    step = options.step or (best_step(run) if options.best else last)
    if step is None:
        raise InputError(f"export.best=true: {run} holds no evaluation; go on with: {over}")
    more = "" if step == last else "trainer.keep_best=true " * options.best + f"{OVER} "
    try:
        return read_checkpoint(step_folder(run, step), more)
    except InputError as error:
        others = [other for other in steps if other != step]
        hint = f". Steps {others} are there too (export.step=)" if others else ""
        raise InputError(f"export of step {step}: {error}{hint}") from None


@torch.no_grad()
def compare(cfg: Config, trained: Any, loaded: Any, target: Target, dtype: torch.dtype) -> float:
    """Check the reloaded draft on a held-out conversation; returns the share of equal choices.

    Raises:
        InputError: its logits differ from the trained draft's, rounded to the exported dtype.
    """
    tokens = read_split(paths.tokens_dir(cfg), "eval")
    ids_1T = tokens[0][0][None].to(target.device)
    aux_1TA, _ = target.features(ids_1T)
    exact_TD = trained.all_logits(cfg.draft, ids_1T, aux_1TA)
    for weight in trained.parameters():
        weight.copy_(weight.to(dtype))
    rounded_TD = trained.all_logits(cfg.draft, ids_1T, aux_1TA)
    loaded_TD = loaded.all_logits(cfg.draft, ids_1T, aux_1TA)
    if not torch.equal(rounded_TD, loaded_TD):
        worst = float((rounded_TD - loaded_TD).abs().max())
        raise InputError(f"the exported draft's logits differ from the trained one's by {worst}")
    return float((exact_TD.argmax(-1) == loaded_TD.argmax(-1)).float().mean())
