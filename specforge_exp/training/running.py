"""What every training has around its loop: its processes, whether it is to be made, its record."""

import logging
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_exp import paths
from specforge_exp.artifacts import (
    Fingerprint,
    another,
    changed_target,
    contents,
    describe,
    differing,
    read_record,
    reusable,
)
from specforge_exp.config import Config
from specforge_exp.config.checks import shared_evenly
from specforge_exp.config.machine import command
from specforge_exp.data.tokens import TokenSet, read_split
from specforge_exp.drafts.vocabulary import read_mapping
from specforge_exp.errors import InputError
from specforge_exp.lease import lease
from specforge_exp.provenance import code, maker
from specforge_exp.records import metric_lines, write_record
from specforge_exp.target import check_gpus, set_up_torch, take_what_is_there, text_config
from specforge_exp.training.checkpoint import (
    OVER,
    check_step,
    last_step,
    step_folder,
    step_folders,
)
from specforge_exp.training.loop import Splits, TrainingRun
from specforge_exp.training.ranks import (
    Ranks,
    by_torchrun,
    join,
    launch,
    local_device,
    started,
)

log = logging.getLogger(__name__)

APART = ("gpus", "restarts", "profile", "dump")
"""Options of the trainer in which processes may differ."""
Record = dict[str, Any]
Begin = Callable[[Config, int], Record | None]
"""(configuration, processes) -> the record of a complete run; None: it is to be made."""
Here = Callable[[Config, torch.device, Ranks], Record]
"""This process's part of a training, and the record."""


def in_processes(
    stage: str,
    cfg: Config,
    begin: Begin,
    here: Here,
    workers: Callable[[Config], AbstractContextManager[Any]] | None = None,
    writes: bool = True,
) -> Record:
    """Run a training, in `trainer.gpus` processes or in torchrun's; its record.

    Args:
        stage: its name.
        cfg: the configuration.
        begin: what is settled before.
        here: a process's part.
        workers: what the processes share, entered before they are started; None: nothing.
        writes: whether the run's folder is written to.
    """
    cfg = take_what_is_there(cfg)
    check_gpus(cfg, stage, 1 if started() else int(cfg.trainer.gpus))
    if not started() and (record := begin(cfg, 1)):
        return record
    apart = workers is not None or cfg.trainer.restarts or int(cfg.trainer.gpus) > 1
    inside = partial(in_this_process, begin, here, writes)
    if apart and not started():
        with workers(cfg) if workers else nullcontext():
            launched: Record = launch(inside, cfg, here.__module__)
        return launched
    return inside(cfg)


def in_this_process(begin: Begin, here: Here, writes: bool, cfg: Config) -> Record:
    """As `in_processes`, of one of them."""
    code(cfg)  # as it is imported
    device = local_device(set_up_torch(cfg))
    ranks = join(device)
    if by_torchrun() and (record := ranks.decided(partial(begin, cfg, ranks.world))):
        return record
    with nullcontext() if ranks.rank or not writes else lease(paths.run_dir(cfg)):
        return here(cfg, device, ranks)


def joined_run(cfg: Config, fingerprint: Fingerprint, ranks: Ranks) -> TrainingRun:
    """The run of this process among those that train together.

    Raises:
        InputError: another one, of torchrun's on another machine, has other options, inputs, code
            or packages: each would go its own way with a part of every step.
    """
    layout = {f"trainer.{k}": v for k, v in asdict(cfg.trainer).items() if k not in APART}
    own = {**layout, **fingerprint.settings, "code and packages": maker(cfg)}
    told = ranks.gather((socket.gethostname(), own, fingerprint.inputs))
    ranks.decided(partial(check_alike, told))
    return TrainingRun(paths.run_dir(cfg), fingerprint, ranks, [maker(cfg)])


def check_alike(told: list[tuple[str, dict[str, Any], dict[str, str]]]) -> None:
    """InputError where a process has something else than the first one: of each its host, its
    options and the digests of its inputs, of which a cache may have more files than another."""
    _, first, firsts = told[0]
    for number, (host, own, inputs) in enumerate(told):
        others = [f"{name}={own.get(name)}, the first one {first.get(name)}"
                  for name in {**first, **own} if own.get(name) != first.get(name)]  # fmt: skip
        others += [f"other files of {name}" for name in {**firsts, **inputs}
                   if another(inputs.get(name), firsts.get(name))]  # fmt: skip
        if others:
            raise InputError(
                f"process {number} on {host} has {'; '.join(others[:3])}: all machines need the "
                "same command, configuration files, tokens, code and packages"
            )


def settled(cfg: Config, stage: str, run: TrainingRun) -> Record | None:
    """The record of a complete run; None: it is to be made, or made again.

    Raises:
        InputError: so many processes cannot share a step, or the run is complete and was made of
            something else.
    """
    shared_evenly(cfg.trainer.batch_size, run.ranks.world, "WORLD_SIZE")
    if not cfg.trainer.resume:  # `fit` starts over, once nothing can be refused any more
        return None
    record = run.folder / "run.json"
    if not reusable(record, run.fingerprint, False, stage, OVER) or torn(run.folder, stage):
        return None
    made, own = read_record(record), maker(cfg)
    if own not in (by := made.get("makers", [own])):
        log.info("%s: it was made by %s; this is %s", stage, " and ".join(by), own)
    return made


def read_tokens(tokens: Path) -> tuple[dict[str, Tensor], Splits]:
    """The draft's vocabulary and the conversations."""
    mapping = read_mapping(tokens / "vocab_mapping.pt")
    names = ("train", "eval")
    return mapping, Splits(*(read_split(tokens, name, len(mapping["t2d"])) for name in names))


def check_tokens(cfg: Config, tokens: Path, wanted: dict[str, Any]) -> None:
    """Refuse tokens that preprocess made with other options than these of the training, or for
    another model of the same name."""
    record = read_record(tokens / "run.json")
    other = changed_target(record, cfg.model.path)
    if other:
        text_config(cfg.model)  # it says so where there is none
    changes = [*differing(wanted, record, wanted), *other]
    if changes:
        raise InputError(
            f"{tokens} was made with other options: {'; '.join(changes)}. Train with those, or "
            f"make it again with: {command('preprocess', 'preprocess.force=true', away=False)}"
        )


def check_held_out(cfg: Config, tokens: TokenSet) -> None:
    """Refuse to train without a held-out conversation that has something to predict."""
    if not any(bool((turns_T > 0).any()) for turns_T, _ in tokens.parts()):
        what = "no held-out conversation" + " with a supervised token" * bool(len(tokens))
        raise InputError(
            f"{paths.tokens_dir(cfg)} has {what} to evaluate on; set data.eval "
            f"or raise data.split_eval={cfg.data.split_eval}"
        )


def torn(folder: Path, stage: str) -> bool:
    """Whether a complete run has checkpoints, but its last one is damaged or gone: then it is
    complete no more, and continues from the one before.

    One without any stays complete: it was pulled without them, or they were removed.
    """
    step = last_step(folder, stage)
    if step is None or not step_folders(folder):
        return False
    try:
        check_step(step_folder(folder, step), stage=stage)
    except InputError as error:
        log.warning("%s: %s, as is done now", stage, error)
        with lease(folder):
            (folder / "run.json").unlink()
        return True
    return False


def ended(cfg: Config, run: TrainingRun, evaluation: dict[str, float], **more: Any) -> Record:
    """The record of a run that has come to its end, which the first process writes."""
    run.ranks.wait()
    record = describe(cfg, run.fingerprint.inputs, run.fingerprint.settings)
    seconds = round(logged_seconds(run.folder), 1)
    record |= {"seconds": seconds, "processes": run.ranks.world, "evaluation": evaluation, **more}
    record["makers"] = run.makers
    if run.ranks.rank == 0:
        record["files"] = contents(run.folder, ["metrics.jsonl", "evaluation.json"])
        write_record(run.folder / "run.json", record)
    return record


def logged_seconds(folder: Path) -> float:
    """Seconds of training by metrics.jsonl, over all attempts; 0 where another machine wrote it."""
    lines = metric_lines(folder / "metrics.jsonl")
    return float(sum(line.get("seconds") or 0.0 for line in lines))


def count(module: torch.nn.Module) -> int:
    """Trained parameters."""
    return sum(weight.numel() for weight in module.parameters())
