"""A folder of a sweep holds the outputs of one job: the one that was asked for last."""

import argparse
import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from modal_app import driver

from modal_sweep.client import calls, collect, commands, spawn
from modal_sweep.client.volumes import upload, volume
from modal_sweep.container import worker
from modal_sweep.errors import LaunchError
from modal_sweep.protocol import outputs
from modal_sweep.protocol.journal import Journal


def planned(
    journal: Journal, identity: str, status: str | None, folder: str = "0", **more: Any
) -> None:
    """A job that was spawned, and its end."""
    place = f"/there/{folder}"
    plan = {"event": "plan", "identity": identity, "job": 0, "code": "c", "subdir": folder}
    plan |= {"overrides": [], "unique": [f"/runs/{folder}"], "ref": {"output_dir": place}}
    plan |= more
    journal.write([plan, {"event": "spawn", "identity": identity, "generation": 0, "call": "fc"}])
    if status:
        end = {"event": "end", "identity": identity, "generation": 0, "status": status}
        journal.write([end])


def test_what_was_superseded_does_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure of the job that was mended: its outputs would come over those of the new one."""
    journal = Journal(tmp_path)
    journal.write([{"event": "sweep", "id": "s", "dict": "d"}])
    planned(journal, "before", "failed")
    planned(journal, "mended", "completed")
    assert [record.identity for record in journal.current()] == ["mended"]
    monkeypatch.setattr(commands.preflight, "refuse_elsewhere", lambda journal: {})
    arguments = argparse.Namespace(sweep=tmp_path, job=[], failed=True)
    with pytest.raises(LaunchError, match="nothing to run again"):
        commands.rerun(arguments)
    planned(journal, "before", "failed")  # asked for again
    assert [record.identity for record in Journal(tmp_path).current()] == ["before"]


def test_a_number_that_is_given_twice_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls at once would write to one folder, and the first would be paid for in vain."""
    journal = Journal(tmp_path)
    journal.write([{"event": "sweep", "id": "s", "dict": "d"}])
    planned(journal, "failed", "failed")
    spawned: list[str] = []
    monkeypatch.setattr(commands.preflight, "refuse_elsewhere", lambda journal: {})
    monkeypatch.setattr(spawn, "respawn", lambda journal, record: spawned.append(record.identity))
    monkeypatch.setattr(commands, "finish", lambda journal, records: len(records))
    arguments = argparse.Namespace(sweep=tmp_path, job=[0, 0], failed=True)
    assert commands.rerun(arguments) == 1
    assert spawned == ["failed"]


@pytest.mark.parametrize("place", ["/there/0", "/runs/0"])
def test_two_jobs_in_one_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the second comes later, with the same code and other options."""
    journal = Journal(tmp_path)
    planned(journal, "first", None)
    answers: list[Any] = [None]
    monkeypatch.setattr(calls, "look", lambda call: answers[0])
    settings = SimpleNamespace(unique=["/runs/0"] if place == "/runs/0" else [])
    job: Any = SimpleNamespace(
        identity="second", code=SimpleNamespace(digest="c"), settings=settings, output_dir=place
    )
    with pytest.raises(LaunchError, match=r"has jobs that write there in flight \(job 0\)"):
        spawn.refuse_other_code(journal, [job])
    answers[0] = {"status": "completed"}
    spawn.refuse_other_code(journal, [job])


def test_files_of_a_replaced_job_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the job now there has not written is removed, unless it was changed here."""
    source = SimpleNamespace(read_file=lambda path: [path.removeprefix("0/outputs/").encode()])
    monkeypatch.setattr(collect, "saved_at", lambda journal, record: (source, "0"))
    journal = Journal(tmp_path)
    journal.write([{"event": "sweep", "id": "s", "dict": "d", "volume": "v"}])

    def bring(
        identity: str, *names: str, inline: bool, folder: str = "0", number: int = 0
    ) -> set[str]:
        planned(journal, identity, "completed", folder, job=number)
        digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
        listed = {name: {"size": len(name), "sha256": digests[name]} for name in names}
        envelope: dict[str, Any] = {"manifest": listed}
        if inline:
            envelope = {"files": {name: name for name in names}}
        collect.bring(journal, journal.jobs[identity], envelope)
        return {path.name for path in (tmp_path / folder).rglob("*") if path.is_file()}

    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "mine").write_text("of nobody")
    assert bring("a" * 9, "both", "old", "edited", inline=True) == {"both", "old", "edited", "mine"}
    (tmp_path / "0" / "edited").write_text("here")
    assert bring("other", "old", inline=False, folder="1") == {"old"}
    assert bring("b" * 9, "both", "new/er", inline=False) == {"both", "er", "edited", "mine"}
    assert bring("a" * 9, "both", "old", inline=True) == {"both", "old", "edited", "mine"}
    assert bring("a" * 9, "both", inline=True) == {"both", "edited", "mine"}  # run again
    assert bring("a" * 9, "both", "late", inline=True) == {"both", "edited", "mine", "late"}
    assert bring("a" * 9, "both", inline=True, number=2) == {"both", "edited", "mine"}  # as another
    assert (tmp_path / "1" / "old").exists()


def test_what_is_brought_is_what_a_result_lists(tmp_path: Path) -> None:
    """A file of that size that is here may be another job's; one that comes, damaged."""
    folder, asked = tmp_path / "0", list[str]()
    folder.mkdir()
    listed = {"size": 6, "sha256": hashlib.sha256(b"of now").hexdigest()}
    (folder / "same").write_text("of now")
    (folder / "other").write_text("before")

    def read(name: str) -> list[bytes]:
        asked.append(name)
        return [b"of ", b"now"]

    names = ("same", "other", "new/er")
    assert outputs.pull(dict.fromkeys(names, listed), folder, read) == 2
    assert asked == ["other", "new/er"]
    assert [(folder / name).read_text() for name in names] == ["of now"] * 3
    with pytest.raises(OSError, match="same came back damaged"):
        outputs.pull({"same": listed | {"sha256": "of another"}}, folder, read)
    assert not (folder / "same").exists()
    for name in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(ValueError, match="does not lie below"):
            outputs.pull({name: listed}, folder, read)


def test_two_processes_bring_the_same_file(tmp_path: Path) -> None:
    """The launching process and `attach`: either has it whole, whoever is first."""
    listed = {"size": 6, "sha256": hashlib.sha256(b"of now").hexdigest()}
    begun, told = os.pipe()

    def slowly(name: str) -> Iterator[bytes]:
        yield b"of "
        os.write(told, b"x")
        os.kill(os.getpid(), signal.SIGSTOP)
        yield b"now"

    if (child := os.fork()) == 0:
        fetched = 0
        with contextlib.suppress(OSError):
            fetched = outputs.pull({"file": listed}, tmp_path, slowly)
        os._exit(fetched)
    os.read(begun, 1)
    os.waitpid(child, os.WUNTRACED)
    assert outputs.pull({"file": listed}, tmp_path, lambda name: [b"of ", b"now"]) == 1
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"of now"


def test_what_an_attempt_gets_back_is_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that an attempt before it has made in the launch directory are brought here, too."""
    monkeypatch.setattr(worker, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(worker, "common_part", lambda digest: b"")
    cwd, saved = tmp_path / "launch", tmp_path / "volume" / "cwd"
    for path in (cwd / "own", saved / "made"):
        path.parent.mkdir(parents=True)
        path.write_text("text")
    nothing = hashlib.sha256(b"").hexdigest()
    reference = {"key": "a.0", "cwd": str(cwd), "output_dir": str(tmp_path / "out"),
                 "progress_file": None, "progress_keys": [], "sync_cwd": True,
                 "common": nothing, "sha256": nothing}  # fmt: skip
    cloud: Any = SimpleNamespace(attempt=2)
    assert [*worker.Attempt(reference, b"", saved.parent, cloud).save_cwd()] == ["made"]
    assert (cwd / "made").read_text() == "text"


@pytest.mark.usefixtures("on_local_modal")
def test_equal_paths_of_two_volumes_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all of it goes to one folder; what one Volume has keeps its path."""
    monkeypatch.setattr(collect, "pull", lambda journal, record: 0)
    monkeypatch.setattr(commands.preflight, "refuse_elsewhere", lambda journal: {})
    for name in ("runs", "sets"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
        upload(volume(f"two-{name}"), tmp_path / name, "0")
    options = {"volumes": {"/runs": "two-runs", "/sets": "two-sets"}}
    for unique, found in (
        (["/runs/0"], {"0/x": "runs"}),
        (["/runs/0", "/sets/0"], {"two-runs/0/x": "runs", "two-sets/0/x": "sets"}),
    ):
        sweep, here = tmp_path / f"sweep{len(unique)}", tmp_path / f"here{len(unique)}"
        journal = Journal(sweep)
        journal.write([{"event": "sweep", "id": "s", "dict": "d"}])
        planned(journal, "one", "completed", unique=unique, options=options)
        commands.pull(argparse.Namespace(sweep=sweep, checkpoints=True, to=here))
        files = [path for path in here.rglob("*") if path.is_file()]
        assert {path.relative_to(here).as_posix(): path.read_text() for path in files} == found


@pytest.mark.slow
@pytest.mark.usefixtures("on_local_modal")
def test_a_result_that_is_taken_again_brings_its_outputs(tmp_path: Path) -> None:
    sweep, texts = tmp_path / "sweep", []
    for steps in (2, 3, 2):
        driver.run(driver.command(sweep, f"+name=one{steps}", steps=steps))
        texts.append((sweep / "0" / "weights.txt").read_text())
    assert texts[0] == texts[2] != texts[1] and len(driver.events(sweep, "spawn")) == 2
