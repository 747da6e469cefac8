"""Preprocess is killed, stopped, or loses a process: what is done stays, and nobody lives on."""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm
from holding import environment, hold, release
from test_preprocess import content, put, say, source  # noqa: F401 (a fixture)

from specforge_exp import paths
from specforge_exp.config import Config
from specforge_exp.data import blocks
from specforge_exp.data.tokens import read_split
from specforge_exp.errors import InputError
from specforge_exp.stages.preprocess import preprocess

BAD = Path("/proc/self/mem")
"""Reading its first bytes is an input/output error."""


@pytest.mark.skipif(not BAD.exists(), reason="no /proc")
def test_an_error_of_the_disk_is_said_by_a_process(cfg: Config, tmp_path: Path) -> None:
    """It does not look like a process without memory, and the file is named."""
    (tmp_path / "bad.jsonl").symlink_to(BAD)
    parts = [blocks.LineBlock(tmp_path / "bad.jsonl", number, 0, 10, 1) for number in range(2)]
    with pytest.raises(InputError, match=r"bad\.jsonl: Input/output error$"):
        list(blocks.in_processes(parts, cfg, tmp_path, 2))


@pytest.fixture
def command(cfg: Config, source: Path) -> list[str]:  # noqa: F811
    """preprocess.py over 12 blocks, some seconds of work."""
    texts = [f"It is number {i} of many. " * 15 for i in range(10)]
    put(source, [say("Hi", texts[i % 10], name=str(i)) for i in range(12 * blocks.LINES)])
    return [
        sys.executable, "preprocess.py", "model=tiny", "data=local", "data.path=none",
        "data.name=small", "preprocess.source=prep", "device=cpu",
        "draft.draft_vocab_size=512", f"paths.datasets={cfg.paths.datasets}",
        f"paths.checkpoints={cfg.paths.checkpoints}",
    ]  # fmt: skip


@contextlib.contextmanager
def at_work(command: list[str], cfg: Config) -> Iterator[warm.Started]:
    """The command in a session of its own, once it has finished two blocks; it gets no further
    than eight."""
    partial = partial_of(cfg)
    hold(partial, 8)
    process = warm.start(command, env=environment(), together=True, session=True)
    try:
        until(lambda: len(finished(cfg)) > 1 or process.poll() is not None)
        assert process.poll() is None
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        release(partial)


def partial_of(cfg: Config) -> Path:
    folder = paths.tokens_dir(cfg)
    return folder.with_name(folder.name + ".partial")


def finished(cfg: Config) -> list[Path]:
    return sorted(partial_of(cfg).glob("blocks/*.safetensors"))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_killed_it_continues(cfg: Config, command: list[str]) -> None:
    with at_work([*command, "preprocess.processes=1"], cfg) as process:
        process.kill()
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in finished(cfg)}
    assert 2 <= len(kept) <= 12
    done = warm.run([*command, "preprocess.processes=1"])
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 13 blocks are there" in done.stdout
    folder = paths.tokens_dir(cfg)
    continued = content(folder)
    assert len(read_split(folder, "train")) == 12 * blocks.LINES
    assert "blocks" not in continued
    cfg.preprocess.force = True
    cfg.max_length = 2048
    cfg.preprocess.processes = 1
    assert content(preprocess(cfg)) == continued


@pytest.mark.slow
@pytest.mark.parametrize("over", ["nothing", "an older one"])
def test_killed_before_any_of_its_writes(cfg: Config, source: Path, over: str) -> None:  # noqa: F811
    """Then the same command makes the same files, and nothing else is there."""
    folder, cfg.preprocess.processes = paths.tokens_dir(cfg), 1
    cfg.preprocess.force = over != "nothing"
    if cfg.preprocess.force:
        preprocess(replace(cfg, max_length=16))
    shutil.copytree(folder.parent, before := folder.parent.with_name("before"))
    whole, names = content(preprocess(cfg)), everything(folder.parent)
    ended = False
    for number in itertools.count(1):
        shutil.rmtree(folder.parent)
        shutil.copytree(before, folder.parent)
        if (child := os.fork()) == 0:
            kill_before(number, str(folder.parent))
            preprocess(cfg)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert content(preprocess(cfg)) == whole
        assert everything(folder.parent) == names, number
        if ended:
            break
    assert number > 20


def everything(folder: Path) -> list[Path]:
    """All that lies below a folder, but for the file of a writer that was killed."""
    return sorted(path for path in folder.rglob("*") if path.suffix != ".lease")


def kill_before(number: int, folder: str) -> None:
    """From here on this process ends as by a kill before it makes, opens to write, renames or
    removes something for that many times below a folder."""
    left = [number]
    changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

    def count(event: str, given: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (writes or event in changes) and str(given[0]).startswith(folder):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_it(cfg: Config, command: list[str], number: signal.Signals) -> None:
    with at_work([*command, "preprocess.processes=2"], cfg) as process:
        assert len(members(process.pid)) >= 3
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        process.wait(300)
        assert process.returncode
        until(lambda: not members(process.pid))


@pytest.mark.slow
def test_a_process_that_dies_is_reported(cfg: Config, command: list[str]) -> None:
    with at_work([*command, "preprocess.processes=2"], cfg) as process:
        workers = [pid for child in children_of(process.pid) for pid in children_of(int(child))]
        os.kill(int(workers[0]), signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1
        assert "a process of preprocess died on train-0" in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_a_process_that_dies_between_two_blocks_is_reported(cfg: Config, source: Path) -> None:  # noqa: F811
    put(source, [say("Hi", "Hello.", name=str(i)) for i in range(2 * blocks.LINES + 1)])
    three = blocks.cut(source / "train.jsonl")
    dealt = blocks.in_processes(three, cfg, source, 1)
    assert next(dealt) == three[0]
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    with pytest.raises(InputError, match="a process of preprocess died on train-000001 "):
        next(dealt)
