"""Runs of a sweep with one fleet: each has the numbers of a process with the target, whatever
happens to the others, and the target runs once for those that go together."""

import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import warm
from conftest import REPOSITORY
from holding import hold, release
from ray_runs import (
    RAY,
    STEPS,
    alive,
    assert_equal,
    composed,
    kill,
    nothing_goes_on,  # noqa: F401 (for every test)
    options,
    planned,
    prepared,
    processes,
    start,
    trainers,
)
from test_ranks import with_all_below
from test_ray import nothing_left
from test_resume import lines, run_of, wait_for_step

from specforge_exp.config import Config
from specforge_exp.stages.train import train
from specforge_exp.training.ranks import launch

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        find_spec("ray") is None or sys.platform != "linux",
        reason="Ray is not installed: pip install -e '.[ray]'",
    ),
]
LOSSES = ("baseline", "full-opd", "mixed", "rkl-only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, and what runs without workers give."""
    folder = prepared(tmp_path_factory.mktemp("shared"))
    for loss in LOSSES:
        train(composed(folder, f"alone-{loss}", f"loss={loss}"))
    return folder


def sweep(folder: Path, log: str) -> warm.Started:
    """All losses, three at a time, with one fleet."""
    return begin(folder, log, "", "loss=glob(*)", "hydra.sweeper.n_jobs=3", "sweep_name=s")


def begin(folder: Path, log: str, prefix: str, *more: str) -> warm.Started:
    """Runs that are named after their loss."""
    words = options(folder, f"{prefix}${{loss.name}}", *RAY, "target.share=sweep", *more)
    words.remove("loss=baseline")
    words = [sys.executable, str(REPOSITORY / "train.py"), "-m", *words]
    return start(words, folder / log, len(LOSSES))


def printed(folder: Path, name: str) -> Path:
    """Where a run's output goes."""
    return folder / "checkpoints" / "sweeps" / "s" / "train" / name / "train.out"


def trainers_of(folder: Path, pid: int, name: str) -> list[int]:
    """The processes that train a run."""
    out = str(printed(folder, name))

    def writes(pid: int) -> bool:
        with suppress(OSError):  # it has ended
            files = Path(f"/proc/{pid}/fd").iterdir()
            return any(os.path.realpath(file) == out for file in files)
        return False

    return [p for p in trainers(pid) if writes(p)]


def counted(text: str) -> tuple[int, int]:
    """Conversations that the target ran on, and those that runs used."""
    [found] = re.findall(r"the target ran on (\d+) .* runs used the states of (\d+)", text)
    return int(found[0]), int(found[1])


def last_step(folder: Path, loss: str) -> int:
    return max(line["step"] for line in lines(composed(folder, loss), loss))


def test_one_dies_one_stops_and_one_comes_late(folder: Path) -> None:
    """Three share one stream. One is killed; meanwhile one stands still, which holds the other
    back, but not the fourth, which begins when the killed one has left its place."""
    cfg = composed(folder, "baseline")
    hold(run_of(cfg, "mixed"), 3)
    hold(run_of(cfg, "full-opd"), 8)
    run = sweep(folder, "first.log")
    wait_for_step(run, cfg, "mixed", 3)  # the others wait for nobody before their buffer is full
    [slow] = trainers_of(folder, run.pid, "mixed")
    os.kill(slow, signal.SIGSTOP)
    release(run_of(cfg, "mixed"))
    wait_for_step(run, cfg, "full-opd", 5)
    [lost] = trainers_of(folder, run.pid, "full-opd")
    kill(lost)
    wait_for_step(run, cfg, "rkl-only", STEPS)  # the fourth
    assert last_step(folder, "mixed") <= last_step(folder, "baseline") < STEPS
    assert len(processes(run.pid, "^ray::TargetWorker")) == 1
    with nothing_left(run.pid):
        os.kill(slow, signal.SIGCONT)
        assert run.wait(300) == 1
    text = (folder / "first.log").read_text()
    assert "full-opd failed: " in text and "Traceback" not in text
    computed, used = counted(text)
    assert computed == 2 * planned(0, STEPS)  # the three's, and the fourth's
    assert 3 * planned(0, STEPS) < used < 4 * planned(0, STEPS)
    for loss in LOSSES:
        if loss != "full-opd":
            assert_equal(composed(folder, loss), loss, f"alone-{loss}")
    assert "this run has its states alone" in printed(folder, "rkl-only").read_text()

    # The same command continues the killed one after its checkpoint, in a stream of its own; the
    # sweep's process is killed meanwhile, and then it continues again.
    hold(run_of(cfg, "full-opd"), STEPS - 1)
    again = sweep(folder, "second.log")
    done = last_step(folder, "full-opd")
    wait_for_step(again, cfg, "full-opd", done + 2)
    family = with_all_below(again.pid)
    with nothing_left(again.pid):
        kill(again.pid)
        assert again.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 300  # the job saves, then the fleet ends
        while alive(family) and time.monotonic() < deadline:
            time.sleep(0.05)
    release(run_of(cfg, "full-opd"))
    third = sweep(folder, "third.log")
    assert third.wait(300) == 0, (folder / "third.log").read_text()
    assert_equal(composed(folder, "full-opd"), "full-opd", "alone-full-opd")
    text = printed(folder, "full-opd").read_text()
    steps = [int(step) for step in re.findall(r"continuing after step (\d+)", text)]
    assert len(steps) == 2 and 0 < steps[0] <= steps[1]
    assert counted((folder / "third.log").read_text()) == (planned(steps[1], STEPS),) * 2
    record = json.loads((folder / "checkpoints/sweeps/s/train/sweep.json").read_text())
    assert {run["status"] for run in record["runs"]} == {"completed"}


def pair(cfg: Config) -> None:
    """In each of two processes, without workers."""
    for loss in ("baseline", "mixed"):
        train(composed(Path(cfg.paths.checkpoints).parent, f"two-{loss}", f"loss={loss}", GPUS))


GPUS = "trainer.gpus=2"


def test_two_trainers_each_one_killed_and_the_hub_too(folder: Path) -> None:
    """The run whose trainer dies starts again from its checkpoint, with states of its own, while
    the other stands still; then the hub is killed, and both go on without it."""
    launch(pair, composed(folder, "pair", GPUS))
    more = "loss=baseline,mixed", GPUS, "trainer.restarts=1", "hydra.sweeper.n_jobs=2"
    cfg = composed(folder, "p-mixed")
    hold(run_of(cfg, "p-baseline"), 8)
    hold(run_of(cfg, "p-mixed"), STEPS - 1)
    run = begin(folder, "pairs.log", "p-", *more, "sweep_name=s")
    for loss in ("baseline", "mixed"):
        wait_for_step(run, cfg, f"p-{loss}", 4)
    still = trainers_of(folder, run.pid, "p-baseline")
    assert len(still) == 2
    for pid in still:
        os.kill(pid, signal.SIGSTOP)
    release(run_of(cfg, "p-baseline"))
    kill(trainers_of(folder, run.pid, "p-mixed")[-1])
    deadline = time.monotonic() + 300
    while "this run has its states alone" not in printed(folder, "p-mixed").read_text():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    with nothing_left(run.pid):
        kill(processes(run.pid, "^ray::Hub")[0])
        release(run_of(cfg, "p-mixed"))
        for pid in still:
            os.kill(pid, signal.SIGCONT)
        assert run.wait(300) == 0, (folder / "pairs.log").read_text()
    assert "continuing after step" in printed(folder, "p-mixed").read_text()
    text = printed(folder, "p-baseline").read_text()
    assert "shares states with no other any more" in text and "Traceback" not in text
    for loss in ("baseline", "mixed"):
        assert_equal(cfg, f"p-{loss}", f"two-{loss}")
