"""Killed, stopped, continued: the losses are those of an uninterrupted run, to the bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import REPOSITORY, SMALL
from holding import environment, hold, release

from specforge_exp.config import Config
from specforge_exp.training.checkpoint import step_folders

STEPS = 24
KILLS = int(os.environ.get("SPECFORGE_KILLS", "2"))
"""Of each training, at random steps."""


def command(cfg: Config, name: str, *more: str) -> list[str]:
    """train.py on the fixture's tokens, 24 steps of four conversations."""
    return [
        sys.executable, str(REPOSITORY / "train.py"), "experiment=smoke", "model=tiny",
        "loss=baseline",
        f"paths.datasets={Path(cfg.paths.datasets).resolve()}",
        f"paths.checkpoints={Path(cfg.paths.checkpoints).resolve()}", f"run_name={name}",
        *SMALL, "max_length=256", "draft.ttt_length=3", f"max_steps={STEPS}",
        "epochs=30", "lr=1e-3", "trainer.batch_size=4", "trainer.log_every=1",
        "trainer.save_every=3", "trainer.eval_every=17", *more,
    ]  # fmt: skip


def start(arguments: list[str], log: Path, kind: str | None = None) -> warm.Started:
    """Run in a session of its own, so that all of its processes can be killed together."""
    return warm.start(arguments, env=environment(), session=True, log=log, kind=kind)


def start_under_nohup(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """As in a terminal that is closed later."""
    with log.open("w") as file:
        return subprocess.Popen(
            ["nohup", *arguments], env=environment(), cwd=REPOSITORY, stdin=subprocess.DEVNULL,
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def kill_all(process: warm.Started) -> None:
    """SIGKILL for its group; returns when all are gone, so that nobody meets a dying writer."""
    group = process.pid
    os.killpg(group, signal.SIGKILL)
    process.wait()
    stats = [path / "stat" for path in Path("/proc").glob("[0-9]*")]
    while stats := [stat for stat in stats if group_of(stat) == group]:
        time.sleep(0.01)


def group_of(stat: Path) -> int:
    """The process group of /proc/<pid>/stat; 0: it has ended."""
    try:
        state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(group)


def run_of(cfg: Config, name: str) -> Path:
    """A run's folder."""
    return Path(cfg.paths.checkpoints) / name


def lines(cfg: Config, name: str) -> list[dict[str, Any]]:
    file = Path(cfg.paths.checkpoints) / name / "metrics.jsonl"
    if not file.exists():
        return []
    whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def losses(cfg: Config, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(cfg, name) if "loss" in line]


def wait_for_step(process: warm.Started, cfg: Config, name: str, step: int) -> None:
    """Until that step is logged; a process that ends on its own is an error."""
    deadline = time.monotonic() + 600
    while not any(line["step"] >= step for line in lines(cfg, name)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finish(arguments: list[str], log: Path, kind: str | None = None) -> str:
    process = start(arguments, log, kind)
    assert process.wait(timeout=300) == 0, log.read_text()
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_one_run_has_one_writer(cfg: Config, tokens: Path, tmp_path: Path, gpus: int) -> None:
    """A second training is refused, naming the first; when that is killed it is not."""
    arguments, log = command(cfg, "one", f"trainer.gpus={gpus}", "trainer.batch_size=2"), "second"
    hold(run_of(cfg, "one"), 2)
    first = start(arguments, tmp_path / "first")
    wait_for_step(first, cfg, "one", 2)
    for more in ([], ["trainer.resume=false"], ["seed=1"]):
        second = start([*arguments, *more], tmp_path / log)
        assert second.wait(300) == 1
        said = (tmp_path / log).read_text()
        found = re.search(r"error: another process writes \S+/one: process (\d+) on", said)
        assert found, said
        assert os.getpgid(int(found[1])) == first.pid
    kill_all(first)
    release(run_of(cfg, "one"))
    finish(arguments, tmp_path / log)
    assert [step for step, _ in losses(cfg, "one")] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_killed_at_random_steps(cfg: Config, tokens: Path, tmp_path: Path, gpus: int) -> None:
    """R27: packed rows, one process or two; kills, each followed by the same command."""
    layout = ["trainer.pack_tokens=300", f"trainer.gpus={gpus}"]
    log = tmp_path / "log"
    finish(command(cfg, "whole", *layout), log)
    killed = command(cfg, "killed", *layout)
    hold(run_of(cfg, "killed"), STEPS - 1)
    for step in sorted(random.Random(3 * gpus).sample(range(4, STEPS - 1), KILLS)):
        process = start(killed, log)
        wait_for_step(process, cfg, "killed", step)
        kill_all(process)
        assert not (Path(cfg.paths.checkpoints) / "killed" / "run.json").exists()
    release(run_of(cfg, "killed"))
    assert re.search(r"continuing after step \d+", finish(killed, log))
    assert [step for step, _ in losses(cfg, "killed")] == list(range(1, STEPS + 1))
    assert losses(cfg, "killed") == losses(cfg, "whole")
    assert "complete, reused" in finish(killed, log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "gpus"), [(signal.SIGINT, 1), (signal.SIGHUP, 1), (signal.SIGTERM, 2)]
)
def test_a_signal_saves_and_is_raised_again(
    cfg: Config, tokens: Path, tmp_path: Path, number: signal.Signals, gpus: int
) -> None:
    """A checkpoint at the very step, a status that says interrupted, a line of metrics in two.

    Under nohup a closed terminal is none.
    """
    layout = [f"trainer.gpus={gpus}", "trainer.log_every=7", "trainer.save_every=30"]
    stopped, log = command(cfg, "stopped", *layout), tmp_path / "log"
    hold(run_of(cfg, "stopped"), 7)  # it stands still before it logs step 14
    process: Any = start_under_nohup(stopped, log) if gpus == 2 else start(stopped, log)
    wait_for_step(process, cfg, "stopped", 7)
    if gpus == 2:
        process.send_signal(signal.SIGHUP)
    process.send_signal(number)
    assert process.wait(timeout=300) != 0, log.read_text()
    release(run_of(cfg, "stopped"))
    assert number != signal.SIGTERM or process.returncode == -signal.SIGTERM
    kept = step_folders(Path(cfg.paths.checkpoints) / "stopped")
    assert kept, log.read_text()
    assert 7 <= int(kept[-1].name.removeprefix("step-")) < 30
    finish(stopped, log)
    finish(command(cfg, "whole", *layout), log)
    assert losses(cfg, "stopped") == losses(cfg, "whole")
