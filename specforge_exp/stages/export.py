"""export: a checkpoint -> the folder that SGLang and vLLM load.

Reads checkpoints/<run_name>/step-*/; writes checkpoints/<run_name>/export/, which is reloaded and
compared with the trained draft before it says done. It is of one checkpoint, by its digest: after
another training under the same name it is refused, not reused. With from= it is made of a draft
that is there already, in any layout.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specforge_exp import paths
from specforge_exp.artifacts import (
    Fingerprint,
    another,
    check,
    model_digest,
    reusable,
    sha256,
    writing,
)
from specforge_exp.config import Config, locate
from specforge_exp.config.checks import typed
from specforge_exp.config.machine import command, on_the_hub
from specforge_exp.config.settings import training_settings
from specforge_exp.data.tokens import read_split
from specforge_exp.drafts.speculators import in_speculators_layout
from specforge_exp.errors import InputError
from specforge_exp.inputs import commands, lacking
from specforge_exp.provenance import own_code
from specforge_exp.serving.downloads import download
from specforge_exp.serving.publishing import model_card, publish
from specforge_exp.target import DTYPES, Target, load_target, set_up_torch
from specforge_exp.target.files import text_config
from specforge_exp.training.checkpoint import (
    OVER,
    Checkpoint,
    last_step,
    read_checkpoint,
    step_folder,
    step_folders,
)
from specforge_exp.training.initial import refuse_others
from specforge_exp.training.tracking import best_step

log = logging.getLogger(__name__)

LOGITS = 2**28
"""The most of a draft that are compared at once: a DFlash of an 8B target has 2.4M for a token."""
LAYOUT = 2
"""Of exported folders: raised whenever the same checkpoint is written in another way."""


def export(cfg: Config) -> Path:
    """Export the run's draft, and upload it with export.push; returns the folder."""
    folder = exported(cfg)
    if cfg.export.push:
        kind, length = locate(cfg.draft._target_), cfg.chain_length
        flat = not in_speculators_layout(folder)
        served = kind.sglang_options(length) if flat else {}, kind.vllm_options(length)
        card = model_card(cfg, paths.run_dir(cfg), *served)
        files = [folder / "config.json", folder / "model.safetensors"]
        publish(cfg.export, files, card)
    return folder


def exported(cfg: Config) -> Path:
    """Export the run's draft, unless it is there."""
    if cfg.export.source is not None:
        return converted(cfg, str(cfg.export.source))
    folder = paths.export_dir(cfg)
    checkpoint = chosen_checkpoint(cfg)
    if another(checkpoint.record["inputs"]["the target"], model_digest(cfg.model.path)):
        raise InputError(
            f"{paths.run_dir(cfg)} holds a checkpoint of another target than "
            f"model.path={cfg.model.path}; name the model it was trained with"
        )
    step = step_folder(paths.run_dir(cfg), checkpoint.step)
    refuse_other_draft(cfg, step, checkpoint.record["settings"])
    # From its record, for a training may remove it; one of an older version does not say it.
    digest = checkpoint.record.get("draft") or sha256(step / "draft.safetensors")
    fingerprint = Fingerprint(
        {**checkpoint.record["inputs"], "the checkpoint": digest, **own_code(cfg, "draft")},
        {"export.dtype": cfg.export.dtype, "step": checkpoint.step, "layout": layout(cfg)},
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
        draft.write(unfinished, target, cfg.model.path, dtype, *drafted(cfg))
        agreement = compare(cfg, draft, kind.load(unfinished, target).to(device), target, dtype)
    log.info(
        "export: complete: %s: step %d, reloaded with equal logits; rounding to %s keeps %.2f %% "
        "of the draft's choices", folder, checkpoint.step, cfg.export.dtype, 100 * agreement,
    )  # fmt: skip
    return folder


def refuse_other_draft(cfg: Config, step: Path, settings: dict[str, Any]) -> None:
    """Raise InputError when the options mean another draft than a checkpoint was trained as."""
    if settings.get("draft._target_", cfg.draft._target_) != cfg.draft._target_:
        raise InputError(
            f"{step} is of draft={settings['draft.name']}, not draft={cfg.draft.name}; give "
            f"draft={settings['draft.name']} and the options that it was trained with"
        )
    records = settings, training_settings(cfg)
    refuse_others(str(step), *(cfg.draft.recalled(record) for record in records))


def layout(cfg: Config) -> int | str:
    """What a fingerprint has for export.format, and for bench.chain_length where that says it."""
    return "".join([f"{LAYOUT}, speculators, {n} tokens" for n in drafted(cfg)]) or LAYOUT


def drafted(cfg: Config) -> list[int]:
    """How many tokens speculators' layout says that a verification is to have; []: it is not it."""
    chosen = cfg.draft.export_format(cfg.export.format)
    return [cfg.chain_length] if chosen == "speculators" else []


def converted(cfg: Config, source: str) -> Path:
    """Make the run's export of a draft in any layout, its weights as they are.

    Raises:
        InputError: the run is a training, or the draft is not one of draft=, is of another target,
            or has what is not known here.
    """
    folder, own = paths.export_dir(cfg), cfg.draft
    if step_folders(paths.run_dir(cfg)):
        raise InputError(
            f"{paths.run_dir(cfg)} holds checkpoints; give from= a run_name of its own"
        )
    theirs = download(source) if on_the_hub(source) else Path(source)
    file = theirs / "model.safetensors"
    if not file.is_file() or not (theirs / "config.json").is_file():
        raise InputError(
            f"from={source} is no folder or hub id of a draft with config.json and one "
            "model.safetensors, the only file of weights that is read"
        )
    digests = {"the checkpoint": sha256(file), "its config": sha256(theirs / "config.json")}
    fingerprint = Fingerprint(
        {"the target": model_digest(cfg.model.path), **digests, **own_code(cfg, "draft")},
        {"layout": layout(cfg)},
    )
    if reusable(folder / "run.json", fingerprint, cfg.export.force, "export"):
        return folder
    kind, device = locate(own._target_), set_up_torch(cfg)
    config, tensors = kind.opened(theirs, text_config(cfg.model).num_hidden_layers)
    options = kind.declared(config)
    if not options:
        raise InputError(f"from={source}: a draft of draft={own.name} is served as it is")
    fed = replace(cfg.model, aux_layers=options["model.aux_layers"])
    target = load_target(fed, device, cfg.model.dtype)
    draft = kind.load(theirs, target)
    dtype = next(value.dtype for value in tensors.values() if value.is_floating_point())
    with writing(folder, fingerprint, cfg, "export") as unfinished:
        draft.write(unfinished, target, cfg.model.path, dtype, *drafted(cfg))
        again = kind.load(unfinished, target).state_dict()
        if not all(value.equal(again[name]) for name, value in draft.state_dict().items()):
            raise InputError(f"from={source}: what was written is not what was read")
    others = {
        f"{key}={typed(value)}" for key, value in options.items()
        if value != vars(own if key[0] == "d" else cfg.model)[key.partition(".")[2]]
    }  # fmt: skip
    line = command("bench", *sorted(others), away=False)
    log.info("export: complete: %s: of %s, weights as they are; bench it: %s", folder, source, line)
    return folder


def chosen_checkpoint(cfg: Config) -> Checkpoint:
    """The checkpoint that export.step names, the best, or the last: never another in its place.

    Raises:
        InputError: it is gone or damaged; names it, the others that are there and the command that
            makes it again.
    """
    run, options, over = paths.run_dir(cfg), cfg.export, command("train", OVER, away=False)
    steps = [int(folder.name[5:]) for folder in step_folders(run)]
    if not steps:
        made = f" {over}" if (run / "run.json").exists() else commands(lacking(cfg, "train"))
        raise InputError(f"{run} holds no checkpoint; make one with:{made}")
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
    most = max(16, LOGITS // (cfg.draft.steps * len(trained.draft_ids_D)))
    ids_1T = tokens[0][0][None, :most].to(target.device)
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
