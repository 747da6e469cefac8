"""Checkpoints: `step-000100/` holds draft, optimizer and loop .safetensors, state.json, and what
metrics.jsonl held: what a training continues from is one folder, whole or refused.

Written under another name and renamed; nothing is pickled.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specforge_exp.artifacts import (
    Fingerprint,
    check,
    contents,
    disk_errors,
    read_object,
    read_record,
    sha256,
)
from specforge_exp.config.machine import command
from specforge_exp.errors import InputError
from specforge_exp.records import sync, sync_tree, write_record
from specforge_exp.sharding import as_in, whole

log = logging.getLogger(__name__)


OVER = "trainer.resume=false"
METRICS = "metrics.jsonl"
ROUNDS = "rollouts"
"""The folder of onpolicy=rollout's answers, in a run's own."""
FILES = ("draft.safetensors", "optimizer.safetensors", "loop.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """What is to be saved after a step."""

    step: int
    """Optimiser steps done."""
    draft: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """The optimiser's tensors by `<weight>:<name>`."""
    partial: dict[str, Tensor]
    """A half-finished line of metrics."""


def take_snapshot(
    step: int,
    draft: nn.Module,
    optimizer: torch.optim.Optimizer,
    partial: dict[str, Tensor],
    writes: bool = True,
) -> Snapshot:
    """Gather what a checkpoint holds; processes that share the draft must all ask.

    One weight is gathered at a time; only the process that writes keeps it, on the CPU.
    """

    def gathered(value: Tensor) -> Tensor:
        full = whole(value)
        return full.cpu() if writes else full.new_empty(0)

    # First, for it also lets go of what an evaluation has gathered: only a share has its name.
    weights = {name: gathered(value) for name, value in draft.state_dict().items()}
    names = weight_names(draft, optimizer)
    moments = {
        f"{names[index]}:{key}": gathered(value)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    return Snapshot(step, weights, moments, partial)


def weight_names(draft: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The weights in the optimiser's order."""
    names = {id(weight): name for name, weight in draft.named_parameters()}
    return [names[id(w)] for group in optimizer.param_groups for w in group["params"]]


@dataclass(frozen=True)
class Checkpoint(Snapshot):
    """What a step's folder holds."""

    random: dict[str, Tensor]
    """State of torch's generators."""
    record: dict[str, Any]
    """inputs and settings of the run that wrote it."""


def step_folders(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = {path: path.name.removeprefix("step-") for path in run_dir.glob("step-*")}
    whole = {path: int(step) for path, step in steps.items() if step.isdigit()}  # not .partial
    return sorted(whole, key=lambda path: whole[path])


def step_folder(run_dir: Path, step: int) -> Path:
    """Where a step's checkpoint lies."""
    return run_dir / f"step-{step:06d}"


def save_checkpoint(
    run_dir: Path, snapshot: Snapshot, fingerprint: Fingerprint, makers: Sequence[str] = ()
) -> Path:
    """Write a checkpoint and return its folder; InputError when the disk is full."""
    folder = step_folder(run_dir, snapshot.step)
    partial = folder.with_suffix(".partial")
    for cut_short in run_dir.glob("step-*.partial"):  # by a kill, at whichever step
        shutil.rmtree(cut_short, ignore_errors=True)
    with disk_errors(partial):
        partial.mkdir(parents=True)
        weights = {name: value.contiguous() for name, value in snapshot.draft.items()}
        random = {"random:cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["random:cuda"] = torch.cuda.get_rng_state()
        save_file(weights, partial / "draft.safetensors")
        save_file(snapshot.optimizer, partial / "optimizer.safetensors")
        save_file(snapshot.partial | random, partial / "loop.safetensors")
        shutil.copyfile(run_dir / METRICS, partial / METRICS)
        record: dict[str, Any] = {"inputs": fingerprint.inputs, "settings": fingerprint.settings}
        record["makers"] = makers
        record["draft"] = sha256(partial / "draft.safetensors")  # what is made of it says this
        record |= {"step": snapshot.step, "files": contents(partial, [*FILES, METRICS])}
        write_record(partial / "state.json", record)
        sync_tree(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(run_dir)
    return folder


def last_step(run_dir: Path, stage: str = "train") -> int | None:
    """The step with which a run ended, as evaluation.json says, whatever checkpoints are left.

    Of a run that has not ended, or of an older version: its newest checkpoint's; None: there is
    none.

    Raises:
        InputError: a record of a complete run cannot be read.
    """
    newest = max((int(path.name[5:]) for path in step_folders(run_dir)), default=None)
    record, file = run_dir / "run.json", "evaluation.json"
    again = f"name export.step=, or train again: {command(stage, OVER, away=False)}"
    if record.exists() and file in read_record(record, again).get("files", {}):
        newest = read_object(run_dir / file, again).get("step", newest)
    return newest


def check_step(folder: Path, over: str = "", stage: str = "train") -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        InputError: a file is missing or not what was written; names the command that helps, the
            stage's with the options `over`.
    """
    again = command(stage, *over.split(), away=False)
    remedy = f"make it again with: {again}"
    if not folder.exists():
        raise InputError(f"{folder} does not exist; {remedy}")
    check(folder, again, "state.json")
    return read_record(folder / "state.json", remedy)


def read_checkpoint(folder: Path, over: str = "", stage: str = "train") -> Checkpoint:
    """Load a checkpoint on the CPU; InputError as `check_step`."""
    record = check_step(folder, over, stage)
    try:
        draft, optimizer, loop = (load_file(folder / name) for name in FILES)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read: {error}") from None
    random = {name: loop.pop(name) for name in list(loop) if name.startswith("random:")}
    return Checkpoint(record["step"], draft, optimizer, loop, random, record)


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """Where a training goes on: the newest checkpoint that can be read.

    A broken one is reported and passed over, for its steps are done again. Who does not train takes
    `last_step`.
    """
    for folder in reversed(step_folders(run_dir)):
        try:
            return read_checkpoint(folder)
        except InputError as error:
            log.warning("%s; falling back to the one before it", error)
    return None


def restore(checkpoint: Checkpoint, draft: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights, moments and random state in place."""
    own = draft.state_dict()
    draft.load_state_dict({n: as_in(own[n], value) for n, value in checkpoint.draft.items()})
    parameters = dict(draft.named_parameters())
    names = weight_names(draft, optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in checkpoint.optimizer.items():
        parameter, _, key = name.rpartition(":")
        shared = as_in(parameters[parameter], value) if value.dim() else value
        state.setdefault(names.index(parameter), {})[key] = shared
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(checkpoint.random["random:cpu"])
    if torch.cuda.is_available() and "random:cuda" in checkpoint.random:
        torch.cuda.set_rng_state(checkpoint.random["random:cuda"])


def start_over(folder: Path) -> int:
    """Forget a run's record, numbers, checkpoints and rollouts, the record first; returns the steps
    done."""
    for name in ("run.json", "evaluation.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for made in (*step_folders(folder), *folder.glob(ROUNDS)):
        shutil.rmtree(made)
    return 0


def forget_old(run_dir: Path, keep_last: int, spared: int | None = None) -> None:
    """Remove all but the newest `keep_last` checkpoints and that of step `spared`."""
    for folder in step_folders(run_dir)[:-keep_last]:
        if folder != step_folder(run_dir, spared or 0):
            shutil.rmtree(folder)
