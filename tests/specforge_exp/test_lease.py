"""One folder, one writer: real processes, a kill, other machines and disks without locks."""

import fcntl
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from specforge_exp import lease as module
from specforge_exp.errors import InputError
from specforge_exp.lease import lease
from specforge_exp.training import mirror

HOLD = """
import sys
from pathlib import Path
from specforge_exp import lease
lease.BEAT = float(sys.argv[2])
if len(sys.argv) > 3:
    lease.machine = lambda: sys.argv[3]
with lease.lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(
    folder: Path, beat: float = 0.05, machine: str = ""
) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the folder."""
    words = [sys.executable, "-c", HOLD, str(folder), str(beat), *([machine] if machine else [])]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def refused(folder: Path, by: str) -> None:
    with pytest.raises(InputError, match=f"another process writes {folder}: {by}"), lease(folder):
        pass


def test_a_second_process_is_refused_and_a_kill_frees(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "thing"
    with holder(folder) as other:
        refused(folder, rf"process {other.pid} on \S+ since")
        with lease(tmp_path / "deep" / "other"):
            pass
        other.kill()
        other.wait()
        with lease(folder):
            refused(folder, f"process {os.getpid()} on")
    assert list(folder.parent.iterdir()) == []


def test_the_beat_of_another_machine_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where its lock is not seen, as between the machines of some file systems."""
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    folder = tmp_path / "thing"
    with holder(folder, machine="elsewhere") as other:
        refused(folder, f"process {other.pid} on")
        other.kill()
        other.wait()
        monkeypatch.setattr(module, "PATIENCE", 0.5)
        with lease(folder):
            assert f"process {other.pid}" in caplog.text
            assert " is gone; taken over" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_locks")
def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.05)
    with lease(tmp_path / "thing"):
        refused(tmp_path / "thing", f"process {os.getpid()} on")


@pytest.mark.usefixtures("no_locks")
def test_a_copy_on_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(request: dict[str, Any]) -> None:
        raise ValueError("the tracker is asked")

    request = {"argv": [], "folder": str(tmp_path), "tracker": "trackio", "trainer": os.getppid()}
    monkeypatch.setattr(mirror, "trackio_copy", reached)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    monkeypatch.setattr(sys, "argv", [])
    assert mirror.main() == 1
    assert json.loads((tmp_path / "tracker.json").read_text())["stopped"] == "the tracker is asked"


def test_who_was_taken_for_gone_writes_no_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was stopped for longer than the others wait. Numbers of processes are a machine's."""
    folder = tmp_path / "thing"
    with holder(folder) as other:
        file = os.open(tmp_path / ".thing.lease", os.O_RDWR)
        while other.poll() is None:  # its next beat may go over this
            module.write(file, {"host": "b", "pid": other.pid, "token": "of another"})
            time.sleep(0.02)
        os.close(file)
        assert other.returncode == 1
    assert f"was taken over by process {other.pid} on b" in capfd.readouterr().err


def test_a_file_that_its_holder_removes_meanwhile_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who locked it would hold what others do not find."""
    lock, waiting, path = fcntl.flock, [True], tmp_path / ".thing.lease"

    def ends_now(file: int, how: int) -> None:
        if waiting:
            waiting.clear()
            path.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", ends_now)
    file = module.take(path)
    assert file is not None and os.path.samestat(os.fstat(file), path.stat())
    os.close(file)


def test_a_half_written_file_has_a_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown, and gone unless it changes."""
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    file = tmp_path / ".thing.lease"
    file.write_text('{"host": ')
    unknown = module.holder_of(file)
    assert unknown and module.name(unknown) == "process ? on ? since ?"
    with lease(tmp_path / "thing"):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    """Of processes that live, and what is no file of `records`, stays."""
    folder, dead = tmp_path / "run", subprocess.Popen(["true"])
    dead.wait()
    folder.mkdir()
    alive = [folder / f"b.json.{os.getpid()}.partial", folder / "step-3.partial"]
    gone = [folder / f"a.json.{dead.pid}.partial", tmp_path / f"run.{dead.pid}.partial"]
    for path in [*alive, *gone]:
        path.touch()
    (folder / f"step.{dead.pid}.partial").mkdir()
    with lease(folder):
        assert {*folder.iterdir()} == {*alive, folder / f"step.{dead.pid}.partial"}
    assert not gone[1].exists()
