"""The target in Ray workers: the numbers of one process, whoever dies, and nothing left behind."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from threading import Event, Thread

import pytest
from holding import hold, release
from ray_runs import (
    DFLASH,
    STEPS,
    alive,
    assert_equal,
    begin,
    composed,
    counted,
    kill,
    nothing_goes_on,  # noqa: F401 (for every test)
    planned,
    prepared,
    processes,
    said,
    trainers,
)
from test_mooncake import NEEDS_MOONCAKE
from test_ranks import listening, with_all_below
from test_resume import lines, run_of, wait_for_step

from specforge_exp.artifacts import read_record
from specforge_exp.config import Config
from specforge_exp.inference.cluster import CLUSTERS
from specforge_exp.stages.train import train
from specforge_exp.training.ranks import launch

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        find_spec("ray") is None or sys.platform != "linux",
        reason="Ray is not installed: pip install -e '.[ray]'",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, and below checkpoints what runs without workers give."""
    folder = prepared(tmp_path_factory.mktemp("ray"))
    train(composed(folder, "eagle3-1"))
    train(composed(folder, "dflash-1", *DFLASH))
    launch(both, composed(folder, "eagle3-2", "trainer.gpus=2"))
    return folder


def both(cfg: Config) -> None:
    """In each of two processes: EAGLE-3, then DFlash."""
    train(cfg)
    folder = Path(cfg.paths.checkpoints).parent
    train(composed(folder, "dflash-2", *DFLASH, "trainer.gpus=2"))


@contextmanager
def nothing_left(pid: int) -> Iterator[None]:
    """After this block nothing is left of a run that was going on before it."""
    family = with_all_below(pid)
    folders = [path for path in CLUSTERS.iterdir() if held_by(path, family)]
    assert len(folders) == 1 and CLUSTERS.stat().st_mode & 0o077 == 0
    before = {path.name for path in Path("/dev/shm").iterdir()}
    yield

    def left() -> list[str]:
        new = {path.name for path in Path("/dev/shm").iterdir()} - before
        names = [name for name in new if "plasma" in name or "ray" in name]
        return [*alive(family), *names, *(str(path) for path in folders if path.exists())]

    deadline = time.monotonic() + 120  # processes that were asked to end do
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() == []


def held_by(folder: Path, family: list[int]) -> bool:
    """Whether a cluster's folder is one of these processes'."""
    return any(str(pid) in path.name for path in folder.glob("session_*") for pid in family)


def test_two_runs_at_once_and_a_worker_killed(folder: Path) -> None:
    """Two trainers and two workers, one killed; beside it DFlash's one trainer with two workers.
    Nothing listens beyond loopback, and none finds the other's cluster."""
    cfg = composed(folder, "e-22")
    hold(run_of(cfg, "e-22"), STEPS - 1)
    eagle3 = begin(folder, "e-22", "trainer.gpus=2", "target.workers=2")
    dflash = begin(folder, "d-12", *DFLASH, "target.workers=2")
    wait_for_step(eagle3, cfg, "e-22", 4)
    os.kill(eagle3.pid, signal.SIGSTOP)
    workers = processes(eagle3.pid, "^ray::TargetWorker")
    kill(workers[0])
    addresses = listening(with_all_below(eagle3.pid))
    os.kill(eagle3.pid, signal.SIGCONT)
    release(run_of(cfg, "e-22"))
    assert len(workers) == 2 and len(addresses) > 4
    assert {address[-8:] for address in addresses} == {"0100007F"}  # 127.0.0.1
    assert eagle3.wait(300) == 0, said(folder, "e-22")
    assert dflash.wait(300) == 0, said(folder, "d-12")
    assert_equal(cfg, "e-22", "eagle3-2")
    assert_equal(cfg, "d-12", "dflash-1")
    places = {re.findall(r"started Ray at (\S+);", said(folder, n))[0] for n in ("e-22", "d-12")}
    assert len(places) == 2
    for name in ("e-22", "d-12"):
        account = counted(said(folder, name))
        assert account["taken"] == planned(0, STEPS)
        assert account["asked"] - account["again"] == account["taken"]


def test_a_trainer_is_killed(folder: Path) -> None:
    """The two start again after the checkpoint; the worker goes on, and what the checkpoint has
    used is not asked for again."""
    cfg = composed(folder, "d-21")
    hold(run_of(cfg, "d-21"), STEPS - 1)
    run = begin(folder, "d-21", *DFLASH, "trainer.gpus=2", "trainer.restarts=1")
    wait_for_step(run, cfg, "d-21", 6)
    worker = processes(run.pid, "^ray::TargetWorker")
    _, one = trainers(run.pid)
    kill(one)
    wait_for_step(run, cfg, "d-21", 14)
    assert processes(run.pid, "^ray::TargetWorker") == worker
    with nothing_left(run.pid):
        release(run_of(cfg, "d-21"))
        assert run.wait(300) == 0, said(folder, "d-21")
    assert "start again from the newest checkpoint" in said(folder, "d-21")
    [step] = re.findall(r"continuing after step (\d+)", said(folder, "d-21"))
    assert counted(said(folder, "d-21"))["asked"] == planned(int(step), STEPS)
    assert_equal(cfg, "d-21", "dflash-2")


def test_the_node_is_killed_and_the_run_stopped(folder: Path) -> None:
    """One line; the same command continues. It is stopped by SIGTERM, and then a process that has
    the target itself ends the run."""
    cfg = composed(folder, "e-11")
    hold(run_of(cfg, "e-11"), 10)
    run = begin(folder, "e-11")
    wait_for_step(run, cfg, "e-11", 6)
    with nothing_left(run.pid):
        kill(processes(run.pid, "raylet/raylet")[0])
        assert run.wait(300) == 1
    text = said(folder, "e-11")
    [line] = re.findall(r"error: .*", text)
    assert re.fullmatch(
        r"error: Ray's raylet \(process \d+\) has ended; run the same command to continue", line
    )
    assert "Traceback" not in text and "state-dump" not in text
    done = max(int(step) for step in re.findall(r"(\d+)/24", text) or ["6"])
    hold(run_of(cfg, "e-11"), STEPS - 1)
    again = begin(folder, "e-11")
    wait_for_step(again, cfg, "e-11", min(done + 6, STEPS - 6))
    with nothing_left(again.pid):
        again.terminate()
        assert again.wait(300) == -signal.SIGTERM, said(folder, "e-11")
    assert "continuing after step" in said(folder, "e-11")
    assert "run the same command to continue" in said(folder, "e-11")
    train(composed(folder, "e-11"))
    assert_equal(cfg, "e-11", "eagle3-1")


def test_the_launching_process_is_killed(folder: Path) -> None:
    """Nothing lives on, Ray's agents neither; the same command continues, as the others show."""
    cfg = composed(folder, "e-killed")
    hold(run_of(cfg, "e-killed"), STEPS - 1)
    run = begin(folder, "e-killed")
    wait_for_step(run, cfg, "e-killed", 2)
    with nothing_left(run.pid):
        kill(run.pid)
        assert run.wait() == -signal.SIGKILL


def test_proposals_are_judged_by_workers(folder: Path) -> None:
    """Replay, with a worker killed that keeps what it has read: the numbers of one process."""
    replay = (
        "onpolicy=replay",
        "onpolicy.anchors=8",
        "onpolicy.errors=0.5",
        "trainer.init=eagle3-1",
    )
    train(composed(folder, "replay-1", *replay))
    cfg = composed(folder, "replay-12")
    hold(run_of(cfg, "replay-12"), STEPS - 1)
    process = begin(folder, "replay-12", *replay, "target.workers=2")
    wait_for_step(process, cfg, "replay-12", 4)
    kill(processes(process.pid, "^ray::TargetWorker")[0])
    release(run_of(cfg, "replay-12"))
    assert process.wait(300) == 0, said(folder, "replay-12")
    assert_equal(cfg, "replay-12", "replay-1")
    assert "proposed tokens beside" in said(folder, "replay-12")
    record = read_record(run_of(cfg, "replay-12") / "run.json")
    assert (record["processes"], record["workers"]) == (1, 2)


@NEEDS_MOONCAKE
def test_mooncake_and_everybody_killed(folder: Path) -> None:
    """The master: one line, nothing left, and the same command continues. Then a worker: what it
    has put stays; and the holder: what it held is asked for again. Equal losses."""
    cfg = composed(folder, "m-11")
    hold(run_of(cfg, "m-11"), 6)
    run = begin(folder, "m-11", "target.store=mooncake")
    wait_for_step(run, cfg, "m-11", 5)
    with nothing_left(run.pid):
        kill(processes(run.pid, "mooncake_master")[0])
        release(run_of(cfg, "m-11"))  # it may have stood still with all states that it needs so far
        assert run.wait(300) == 1
    text = said(folder, "m-11")
    [line] = re.findall(r"error: .*", text)
    assert re.fullmatch(
        r"error: Mooncake's master \(process \d+\) has ended; run the same .*", line
    )
    assert "Traceback" not in text and "asking again" not in text
    hold(run_of(cfg, "m-11"), 18)  # states of later steps are held then
    again = begin(folder, "m-11", "target.store=mooncake")
    wait_for_step(again, cfg, "m-11", 9)
    [holder] = processes(again.pid, "inference.holder")
    kill(processes(again.pid, "^ray::TargetWorker")[0])
    wait_for_step(again, cfg, "m-11", 14)
    assert processes(again.pid, "inference.holder") == [holder]
    text = said(folder, "m-11")
    assert text.count("asking again") <= 1  # for the call that it was killed in
    kill(holder)
    with nothing_left(again.pid):
        release(run_of(cfg, "m-11"))
        assert again.wait(300) == 0, said(folder, "m-11")
    text, account = said(folder, "m-11"), counted(said(folder, "m-11"))
    assert "another takes its place" in text and "LostStates: Mooncake has lost" in text
    [step] = re.findall(r"continuing after step (\d+)", text)
    assert account["taken"] == planned(int(step), STEPS) == account["asked"] - account["again"]
    assert_equal(cfg, "m-11", "eagle3-1")


@contextmanager
def throttled(pid: int) -> Iterator[None]:
    """A process that stands still seven eighths of the time, however late this one comes to stop
    it."""
    over = Event()

    def throttle() -> None:
        began = time.monotonic()
        while not over.wait(0.01):
            os.kill(pid, signal.SIGSTOP)
            over.wait(7 * (time.monotonic() - began))
            began = time.monotonic()
            os.kill(pid, signal.SIGCONT)

    thread = Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_waiting_and_busy_point_at_the_slow_side(folder: Path) -> None:
    """First the worker is slow, then the trainer."""
    words = ("max_steps=9999", "epochs=9999", "trainer.eval_every=9999", "trainer.save_every=9999")
    run = begin(folder, "slow", *words, "target.buffer_gb=0.005")
    cfg = composed(folder, "slow")
    wait_for_step(run, cfg, "slow", 1)
    [worker] = processes(run.pid, "^ray::TargetWorker")
    [trainer] = trainers(run.pid)
    medians = []
    for slow in (worker, trainer):
        with throttled(slow):
            before = len(lines(cfg, "slow"))
            wait_for_step(run, cfg, "slow", before + 10)
            rows = lines(cfg, "slow")[before + 5 :]
        medians.append([median(row[k] for row in rows) for k in ("data_wait", "worker_busy")])
    run.terminate()
    run.wait(300)
    slow_worker, slow_trainer = medians
    assert slow_worker[0] > slow_trainer[0] and slow_worker[1] > slow_trainer[1], medians
