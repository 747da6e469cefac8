"""Killed, stopped, continued: the losses are those of an uninterrupted run, to the bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from specforge_exp.checkpoint import step_folders
from specforge_exp.config import Config

STEPS = 40


def command(cfg: Config, name: str, *more: str) -> list[str]:
    """train.py on the fixture's tokens, 40 steps of four conversations."""
    return [
        sys.executable, str(REPOSITORY / "train.py"), "experiment=smoke", "model=tiny",
        "loss=baseline",
        f"paths.datasets={Path(cfg.paths.datasets).resolve()}",
        f"paths.checkpoints={Path(cfg.paths.checkpoints).resolve()}", f"run_name={name}",
        "data.name=small", "max_length=256", "draft.ttt_length=3", f"max_steps={STEPS}",
        "epochs=30", "lr=1e-3", "trainer.batch_size=4", "trainer.log_every=1",
        "trainer.save_every=3", "trainer.eval_every=17", *more,
    ]  # fmt: skip


def start(arguments: list[str], log: Path) -> subprocess.Popen[str]:
    """Run in a session of its own, so that all of its processes can be killed together."""
    with log.open("w") as output:
        return subprocess.Popen(
            arguments,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(  # noqa: PLW1509 (a background shell ignores it)
                signal.SIGINT, signal.SIG_DFL
            ),
        )


def lines(cfg: Config, name: str) -> list[dict[str, Any]]:
    file = Path(cfg.paths.checkpoints) / name / "metrics.jsonl"
    if not file.exists():
        return []
    whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def losses(cfg: Config, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(cfg, name) if "loss" in line]


def wait_for_step(process: subprocess.Popen[str], cfg: Config, name: str, step: int) -> None:
    """Until that step is logged; a process that ends on its own is an error."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in lines(cfg, name)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def listening(session: int) -> list[str]:
    """Local addresses, in hexadecimal, on which processes of a session accept connections."""
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            if os.getsid(pid) == session:
                links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
                inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def finish(arguments: list[str], log: Path) -> str:
    process = start(arguments, log)
    assert process.wait(timeout=300) == 0, log.read_text()
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_killed_at_random_steps(cfg: Config, tokens: Path, tmp_path: Path, gpus: int) -> None:
    """Packed rows, one process or two; five kills each, every one followed by the same command."""
    layout = ["trainer.pack_tokens=300", f"trainer.gpus={gpus}"]
    log = tmp_path / "log"
    finish(command(cfg, "whole", *layout), log)
    killed = command(cfg, "killed", *layout)
    for step in sorted(random.Random(gpus).sample(range(1, STEPS - 1), 5)):
        process = start(killed, log)
        wait_for_step(process, cfg, "killed", step)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (Path(cfg.paths.checkpoints) / "killed" / "run.json").exists()
    assert re.search(r"continuing after step \d+", finish(killed, log))
    assert [step for step, _ in losses(cfg, "killed")] == list(range(1, STEPS + 1))
    assert losses(cfg, "killed") == losses(cfg, "whole")
    assert "complete, reused" in finish(killed, log)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "gpus"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_is_raised_again(
    cfg: Config, tokens: Path, tmp_path: Path, number: signal.Signals, gpus: int
) -> None:
    """A checkpoint at the very step, a status that says interrupted, a line of metrics in two."""
    layout = [f"trainer.gpus={gpus}", "trainer.log_every=7", "trainer.save_every=30"]
    stopped, log = command(cfg, "stopped", *layout), tmp_path / "log"
    process = start(stopped, log)
    wait_for_step(process, cfg, "stopped", 7)
    process.send_signal(number)
    assert process.wait(timeout=120) != 0, log.read_text()
    assert number != signal.SIGTERM or process.returncode == -signal.SIGTERM
    kept = step_folders(Path(cfg.paths.checkpoints) / "stopped")
    assert kept, log.read_text()
    assert 7 <= int(kept[-1].name.removeprefix("step-")) < 30
    finish(stopped, log)
    finish(command(cfg, "whole", *layout), log)
    assert losses(cfg, "stopped") == losses(cfg, "whole")


@pytest.mark.slow
def test_one_process_or_two(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """The same losses and metrics; a run may go on with another number of processes.

    Nothing listens beyond loopback.
    """
    log = tmp_path / "log"
    finish(command(cfg, "one"), log)
    finish(command(cfg, "two", "trainer.gpus=2"), log)
    compared = ("loss", "ce", "alpha/0", "top1/2", "simulated_length", "supervised")
    for one, two in zip(lines(cfg, "one"), lines(cfg, "two"), strict=True):
        for key in compared:
            name = key if key in one else f"eval/{key}"
            assert two[name] == pytest.approx(one[name], rel=2e-5), (one["step"], name)
    both = command(cfg, "both", "trainer.save_every=2")
    process = start([*both, "trainer.gpus=2"], log)
    wait_for_step(process, cfg, "both", 5)
    if sys.platform == "linux":
        assert set(listening(process.pid)) == {"0100007F"}  # 127.0.0.1
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "continuing after step" in finish(both, log)
    assert dict(losses(cfg, "both")) == pytest.approx(dict(losses(cfg, "one")), rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_shared_target(cfg: Config, tokens: Path, tmp_path: Path, cache: str) -> None:
    """Two processes that share the target's layers train as one that holds it."""
    log = tmp_path / "log"
    options = ("max_steps=8", f"target.cache={cache}", "trainer.pack_tokens=300")
    shared = ("target.shard=true", "trainer.gpus=2")
    finish(command(cfg, "shared", *options, *shared), log)
    finish(command(cfg, "alone", "max_steps=8"), log)
    assert dict(losses(cfg, "shared")) == pytest.approx(dict(losses(cfg, "alone")), rel=2e-5)


@pytest.mark.slow
def test_a_shared_draft(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """FSDP2 in two processes, packed so that they differ in forwards; killed, and gone on alone."""
    log = tmp_path / "log"
    options = ("max_steps=12", "trainer.pack_tokens=150", "trainer.eval_every=5")
    shared = command(cfg, "shared", *options, "trainer.shard=true", "trainer.gpus=2")
    process = start(shared, log)
    wait_for_step(process, cfg, "shared", 7)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "continuing after step" in finish(command(cfg, "shared", *options), log)
    finish(command(cfg, "alone", *options), log)
    assert dict(losses(cfg, "shared")) == pytest.approx(dict(losses(cfg, "alone")), rel=2e-5)
    finish([*shared, "run_name=again"], log)
    finish([*shared, "run_name=again"], log)
    assert dict(losses(cfg, "again")) == pytest.approx(dict(losses(cfg, "alone")), rel=2e-5)


@pytest.mark.slow
def test_eight_processes(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """Twenty steps of eight conversations on eight processes over gloo."""
    options = ("trainer.batch_size=8", "max_steps=20", "trainer.eval_every=50")
    finish(command(cfg, "one", *options), tmp_path / "log")
    finish(command(cfg, "eight", *options, "trainer.gpus=8"), tmp_path / "log")
    alone = dict(losses(cfg, "one"))
    assert dict(losses(cfg, "eight")) == pytest.approx(alone, rel=2e-5)
    assert len(alone) == 20


@pytest.mark.slow
def test_a_refusal_of_a_process_is_one_line(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """A loss that is not a number, in two processes: no traceback, and what to do."""
    log = tmp_path / "log"
    process = start(command(cfg, "nan", "trainer.gpus=2", "lr=1e30", "trainer.clip=1e30"), log)
    assert process.wait(timeout=300) == 1
    assert "Traceback" not in log.read_text()
    assert re.search(r"error: the loss is (nan|inf) at step \d+", log.read_text())
