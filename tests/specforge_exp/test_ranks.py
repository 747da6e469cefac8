"""As many processes as there are, sharing target and draft or not: the same numbers."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import warm
from holding import hold, release
from test_resume import (
    command,
    finish,
    kill_all,
    lines,
    losses,
    run_of,
    start,
    wait_for_step,
)

from specforge_exp import paths
from specforge_exp.config import Config, TargetConfig
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.errors import InputError
from specforge_exp.stages.train import train
from specforge_exp.training.checkpoint import step_folders
from specforge_exp.training.ranks import STORE, TIMEOUT, join, launch
from specforge_exp.training.running import check_alike
from specforge_exp.training.streamed import PATIENCE

COMPARED = ("loss", "ce", "alpha/0", "top1/2", "simulated_length", "supervised")


def listening(pids: list[int]) -> list[str]:
    """Local addresses, in hexadecimal, on which processes accept connections."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
            inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def small(cfg: Config, name: str, **trainer: Any) -> Config:
    """Eight steps of four conversations."""
    options = {"batch_size": 4, "log_every": 1, "eval_every": 5, "save_every": 5, **trainer}
    return replace(
        cfg, run_name=name, max_steps=8, epochs=30, trainer=replace(cfg.trainer, **options)
    )


def layouts(cfg: Config) -> dict[str, Config]:
    """Ways to lay the same training on processes."""
    dflash = DFlashConfig(
        name="dflash", block_size=4, num_layers=3, num_features=3, draft_vocab_size=512
    )
    checkpointed = {"shard": True, "gradient_checkpointing": True}
    packed = small(cfg, "target", pack_tokens=300)
    return {
        "eagle3": small(cfg, "replicas"),
        # 150: so packed, the processes differ in forwards.
        "eagle3 shared": small(cfg, "shared", shard=True, pack_tokens=150),
        "eagle3, the target too": replace(
            small(cfg, "both", shard=True), target=TargetConfig(shard=True)
        ),
        "eagle3, a cache": replace(packed, target=TargetConfig(shard=True, cache="disk")),
        "dflash": replace(small(cfg, "d-replicas"), draft=dflash),
        "dflash shared": replace(small(cfg, "d-shared", shard=True, pack_tokens=150), draft=dflash),
        "dflash again": replace(small(cfg, "d-checkpointed", **checkpointed), draft=dflash),
    }


def outcome_of(call: Callable[[], object]) -> str:
    """What a call returns or raises, in words."""
    try:
        return str(call())
    except (InputError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def trainings(cfg: Config) -> list[list[str]]:
    """In each of two processes: every layout; the shared ones once more from a checkpoint, and then
    what torchrun's processes answer to the same command. Returns these answers, by process."""
    runs = layouts(cfg)
    for run in runs.values():
        train(run)
    ranks = join(torch.device("cpu"))
    again = [runs["eagle3 shared"], runs["dflash shared"]]
    for run in again:
        folder = paths.run_dir(run)
        if ranks.rank == 0:
            (folder / "run.json").unlink()
            shutil.rmtree(folder / "step-000008")
        ranks.wait()
        train(run)
    os.environ.pop(STORE)  # as torchrun starts them
    answers = [
        outcome_of(partial(train, run))
        for run in (
            again[0],
            replace(again[0], lr=9.0),
            replace(again[0], trainer=replace(again[0].trainer, batch_size=3, gpus=1)),
            # As by two machines, of which one has a file of its own.
            replace(again[0], run_name="apart", lr=again[0].lr * (1 + ranks.rank)),
        )
    ]
    return ranks.gather(answers)


def test_who_has_something_else_is_named() -> None:
    """Of a hub id one cache may have more files; another file, or another tokens, is not alike."""
    options, target = {"lr": 1.0, "trainer.shard": False}, "a/b\nconfig.json 1\nw.safetensors 2"
    first = "one", options, {"x.tokens": "abc", "the target": target}
    check_alike([first, ("two", {**options}, {"x.tokens": "abc", "the target": "a/b"})])
    for inputs, what in (
        ({"x.tokens": "abd", "the target": target}, r"other files of x\.tokens:"),
        ({"x.tokens": "abc", "the target": "a/b\nconfig.json 3"}, "other files of the target:"),
    ):
        with pytest.raises(InputError, match=f"process 1 on two has {what}"):
            check_alike([first, ("two", options, inputs)])
    with pytest.raises(InputError, match=r"has trainer\.shard=True, the first one False: all"):
        check_alike([first, first, ("two", options | {"trainer.shard": True}, first[2])])


@pytest.mark.slow
def test_every_layout_trains_alike(cfg: Config, tokens: Path) -> None:
    """Two processes, with a replica or a share of draft and target each, packed or not, from a
    checkpoint or not: the losses of one process. The first process answers for all."""
    runs = layouts(cfg)
    answers, others = launch(trainings, small(cfg, "launch", gpus=2))
    for kind in ("eagle3", "dflash"):
        alone = replace(runs[kind], run_name=f"{kind}-alone")
        train(alone)
        whole = lines(cfg, alone.run_name)
        for name in [name for name in runs if name.startswith(kind)]:
            run = lines(cfg, runs[name].run_name)
            assert [line["step"] for line in run] == [line["step"] for line in whole], name
            for one, two in zip(whole, run, strict=True):
                for key in COMPARED:
                    shown = key if key in one else f"eval/{key}"
                    expected = pytest.approx(one[shown], rel=2e-5)
                    assert two[shown] == expected, (name, one["step"], shown)
    shared = paths.run_dir(runs["eagle3 shared"])
    assert float(answers[0]) == float(others[0]) > 1
    assert re.match(f"InputError: {shared} is complete, but .* lr was 0.001, now 9.0", answers[1])
    assert answers[2].startswith(
        "InputError: trainer.batch_size=3 conversations cannot be shared evenly by WORLD_SIZE=2; "
        "make batch_size a multiple of WORLD_SIZE (2, 4, 6, ...)"
    )
    assert re.fullmatch(
        r"InputError: process 1 on \S+ has lr=0\.002, the first one 0\.001: all .*same command.*",
        answers[3],
    )
    assert others[1:] == ["SystemExit: 0"] * 3


def four(cfg: Config) -> None:
    """In each of four processes: replicas and shares."""
    train(cfg)
    train(replace(cfg, run_name="shares", trainer=replace(cfg.trainer, shard=True)))


@pytest.mark.slow
def test_four_processes(cfg: Config, tokens: Path) -> None:
    """Two conversations for each in a step, one where an epoch ends."""
    launch(four, small(cfg, "four", gpus=4, batch_size=8, eval_every=50))
    train(small(cfg, "one", batch_size=8, eval_every=50))
    for name in ("four", "shares"):
        assert dict(losses(cfg, name)) == pytest.approx(dict(losses(cfg, "one")), rel=2e-5)


@pytest.mark.slow
def test_killed_and_continued_by_fewer(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """Two processes with a share of the draft each, killed; one goes on. Nothing listens beyond
    loopback."""
    log = tmp_path / "log"
    layout = command(cfg, "killed", "trainer.save_every=2", "trainer.shard=true")
    hold(run_of(cfg, "killed"), 18)
    process = start([*layout, "trainer.gpus=2"], log)
    wait_for_step(process, cfg, "killed", 5)
    if sys.platform == "linux":
        assert set(listening(with_all_below(process.pid))) == {"0100007F"}  # 127.0.0.1
    kill_all(process)
    release(run_of(cfg, "killed"))
    assert "continuing after step" in finish(layout, log)
    finish(command(cfg, "one"), log)
    assert dict(losses(cfg, "killed")) == pytest.approx(dict(losses(cfg, "one")), rel=2e-5)


def with_all_below(pid: int) -> list[int]:
    """A process and what it has started; torchrun's have sessions of their own."""
    stats = [(p, p / "stat") for p in Path("/proc").iterdir() if p.name.isdigit()]
    parents = {}
    for process, stat in stats:
        with suppress(OSError):
            parents[int(process.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_torchrun_starts_over(
    cfg: Config, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trainer.resume=false under torchrun leaves nothing of the old run, wherever it is killed."""
    monkeypatch.setenv("PYTHON_EXEC", warm.python("train.py"))  # torchrun's, of what it starts
    old = small(cfg, "again", save_every=6, batch_size=2)
    train(old)
    folder, log = paths.run_dir(old), tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    options = ("max_steps=8", "trainer.save_every=1", "trainer.keep_last=9")
    fresh = torchrun + command(cfg, "again", *options)[1:]
    hold(folder, 5)
    process = start([*fresh, "trainer.resume=false"], log, "stages")
    while not (folder / "step-000002").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    for pid in with_all_below(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    release(folder)
    assert not (folder / "run.json").exists()
    kept = step_folders(folder)
    assert [path.name for path in kept] == [f"step-{n:06d}" for n in range(1, len(kept) + 1)]
    assert f"continuing after step {len(kept)}" in finish(fresh, log, "stages")
    finish(command(cfg, "whole", *options), log)
    assert dict(losses(cfg, "again")) == pytest.approx(dict(losses(cfg, "whole")), rel=2e-5)
    assert json.loads((folder / "run.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_refusal_of_a_process_is_one_line(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """A loss that is not a number, in two processes: no traceback, and what to do."""
    log = tmp_path / "log"
    process = start(command(cfg, "nan", "trainer.gpus=2", "lr=1e30", "trainer.clip=1e30"), log)
    assert process.wait(timeout=300) == 1
    assert "Traceback" not in log.read_text()
    assert re.search(r"error: the (loss|norm[ a-z]*) is (nan|inf) at step \d+", log.read_text())


def test_a_process_waits_longer_for_another_than_for_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's own limit is as long as a trainer waits for states: whoever waited for that trainer
    died at the same time, without a word."""
    started = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", STORE: str(tmp_path / "store")}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    join(torch.device("cpu"))
    try:
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout == TIMEOUT
        assert TIMEOUT.total_seconds() > 2 * PATIENCE
    finally:
        dist.destroy_process_group()
