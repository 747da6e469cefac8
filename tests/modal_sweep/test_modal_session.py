"""A session keeps jobs in flight on Modal, one by one, and outlives the process that drives it."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from modal_app import driver
from modal_app.session_driver import APP, job, open_session, outcome
from modal_local.client import LocalModal

from modal_sweep.client.session import Session
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.progress import Tail

pytestmark = pytest.mark.usefixtures("on_local_modal")
SECONDS = 300.0


@pytest.fixture(autouse=True)
def fresh_hydra() -> Iterator[None]:
    """Opening a session initialises Hydra in this process."""
    yield
    GlobalHydra.instance().clear()


class Seen:
    """What a session has given so far."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.ends: dict[int, JobReturn] = {}
        self.reports: dict[int, list[dict[str, Any]]] = {}

    def until(self, condition: Callable[["Seen"], bool]) -> "Seen":
        """Drive the session until a condition holds."""
        deadline = time.monotonic() + SECONDS
        while not condition(self):
            assert time.monotonic() < deadline, (self.ends, self.reports)
            for number, returned in self.session.ended(0.5):
                assert number not in self.ends
                self.ends[number] = returned
            for number, lines in self.session.reports().items():
                self.reports.setdefault(number, []).extend(lines)
        return self


def steps(names: set[str], control_plane: LocalModal) -> dict[str, list[list[int]]]:
    executed = driver.steps_by_call(names, control_plane)
    return {name: list(calls.values()) for name, calls in executed.items()}


@pytest.mark.slow
def test_ends_come_as_they_happen(
    tmp_path: Path, held: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is the slowest; one raises, one dies by a signal, one returns NaN, one a pair."""
    session = open_session(tmp_path, total=6)
    (held / "end-value").write_text("1")
    acts = ["value", "raises", "killed", "notanumber", "pair"]
    for number, act in enumerate(acts):
        session.start(number, job(f"end-{act}", x=number, act=act, hold=held))
    session.start(5, ["no-such-group=1"])  # wrong with it alone
    seen = Seen(session).until(lambda seen: len(seen.ends) == 5)
    (held / "end-value").unlink()
    seen.until(lambda seen: len(seen.ends) == 6)
    order = list(seen.ends)
    assert order[0] == 5 and order[-1] == 0
    texts = {number: outcome(returned) for number, returned in seen.ends.items()}
    assert texts[0] == "0.0" and texts[4] == "(4.0, 2.0)"
    for number, reason in ((1, "a trial that raises"), (2, "signal 9"), (3, "NaN")):
        assert reason in texts[number]
        assert seen.ends[number].status == JobStatus.FAILED
    assert "no-such-group" in texts[5]
    assert seen.ends[4].overrides == job("end-pair", x=4, act="pair", hold=held)
    assert (tmp_path / "end-pair" / ".hydra" / "overrides.yaml").exists()
    session.close()
    printed = capsys.readouterr().err
    assert "job 0 [name=end-value" in printed and "raises" in printed
    assert "without this process" not in printed


@pytest.mark.slow
def test_results_are_taken_and_failures_given_until_they_were_heard(tmp_path: Path) -> None:
    """Who is killed between a job's end and the own record of it starts the job again."""

    def ends() -> list[str]:
        session = open_session(tmp_path, total=3)
        session.start(0, job("heard-value"))
        session.start(1, job("heard-pair", act="pair"))
        seen = Seen(session).until(lambda seen: len(seen.ends) == 2)
        session.start(2, job("heard-raises", act="raises"))
        while len(seen.ends) < 3:  # the last call gives this end, and no other call follows
            seen.ends |= dict(session.ended(0.5))
        sessions.append(session)
        return [outcome(seen.ends[number]) for number in range(3)]

    sessions: list[Session] = []
    first = ends()
    assert first[:2] == ["1.0", "(1.0, 2.0)"] and "a trial that raises" in first[2]
    assert ends() == first
    assert len(driver.events(tmp_path, "spawn")) == 3
    sessions[-1].close()  # heard
    assert "a trial that raises" in ends()[2]
    assert [event["generation"] for event in driver.events(tmp_path, "spawn")] == [0, 0, 0, 1]


def test_reports_come_while_a_job_runs_and_once(tmp_path: Path, held: Path) -> None:
    session = open_session(tmp_path)
    (held / "reported").write_text("8")
    session.start(0, job("reported", x=2, pause=0.2, steps=12, hold=held))
    seen = Seen(session).until(lambda seen: len(seen.reports.get(0, [])) >= 3)
    assert not seen.ends
    (held / "reported").unlink()
    seen.until(lambda seen: bool(seen.ends))
    expected = [{"step": step, "score": 2.0 * step} for step in range(12)]
    assert seen.until(lambda seen: len(seen.reports[0]) >= 12).reports[0] == expected
    session.start(1, job("short", x=3))  # over before its worker has said anything
    seen.until(lambda seen: 1 in seen.ends and len(seen.reports.get(1, [])) >= 4)
    assert seen.reports[1] == [{"step": step, "score": 3.0 * step} for step in range(4)]
    assert session.reports() == {}
    session.close()


@pytest.mark.slow
def test_a_stopped_job_saves_and_fails(
    tmp_path: Path, control_plane: LocalModal, capsys: pytest.CaptureFixture[str]
) -> None:
    session = open_session(tmp_path, "hydra.launcher.max_parallel=1", total=3)
    session.start(0, job("stopped", pause=0.5, steps=1000))
    session.start(1, job("waiting"))  # max_parallel: not before the other one has ended
    seen = Seen(session).until(lambda seen: len(seen.reports.get(0, [])) >= 2)
    assert seen.ends == {}
    [waiting] = [event["call"] for event in driver.events(tmp_path, "spawn")][1:]
    assert not control_plane.state()["calls"][waiting]["done"]
    session.stop(0)
    session.stop(7)  # nobody
    seen.until(lambda seen: len(seen.ends) == 2)
    assert outcome(seen.ends[0]).count("was stopped") == 1
    assert outcome(seen.ends[1]) == "1.0"
    saved = (tmp_path / "stopped" / "progress.jsonl").read_text().splitlines()
    assert len(saved) >= 2
    assert [json.loads(line)["step"] for line in saved] == list(range(len(saved)))
    session.start(2, job("left", pause=0.5, steps=1000))
    session.close()
    printed = capsys.readouterr().err
    assert "go on without this process" in printed and "modal-sweep cancel" in printed
    driver.modal_sweep("cancel", tmp_path)


def test_what_the_first_job_is_refused_for(tmp_path: Path) -> None:
    """The cost of all jobs that are going to come; what a search cannot do without results."""
    gpu = ["hydra.launcher.gpu=H100", "hydra.launcher.hours=1"]
    session = open_session(tmp_path, *gpu, total=50)
    with pytest.raises(LaunchError, match=r"50 jobs are estimated at 198 USD"):
        session.start(0, job("dear"))
    session.close()
    assert driver.events(tmp_path, "spawn") == []
    session = open_session(tmp_path, "+hydra.launcher.secrets={nowhere: [KEY]}")
    with pytest.raises(LaunchError, match="modal secret create nowhere"):
        session.start(0, job("secret"))
    for option in ("detach", "dry_run"):
        with pytest.raises(LaunchError, match=rf"hydra.launcher.{option}=true"):
            open_session(tmp_path, f"hydra.launcher.{option}=true")


def test_two_jobs_do_not_write_to_one_place(tmp_path: Path) -> None:
    session = open_session(tmp_path, total=3)
    session.start(0, job("place", x=1))
    session.start(1, job("place", x=2))
    session.start(2, job("place", x=1))  # the same job: one call for both
    seen = Seen(session).until(lambda seen: len(seen.ends) == 3)
    assert "would both write" in outcome(seen.ends[1])
    assert outcome(seen.ends[0]) == outcome(seen.ends[2]) == "1.0"
    assert len(driver.events(tmp_path, "spawn")) == 1
    session.close()


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_killed_at_a_spawn(when: str, tmp_path: Path, control_plane: LocalModal) -> None:
    """A kill between a spawn and its line, and right after it: every step is taken once."""
    names = {f"spawn-{when}-{number}" for number in range(3)}
    jobs = json.dumps([job(name) for name in sorted(names)])
    command = [str(APP / "session_driver.py"), str(tmp_path), jobs]
    driver.run([str(driver.APP / "kill_at_spawn.py"), "2", when, *command], expect=-9)
    assert len(driver.events(tmp_path, "spawn")) == 1 + (when == "after")
    printed = driver.run(command)
    assert printed.count('"said": "1.0"') == 3
    assert steps(names, control_plane) == {name: [[0, 1, 2, 3]] for name in names}


def test_killed_while_jobs_run(tmp_path: Path, held: Path, control_plane: LocalModal) -> None:
    """The next process attaches to the same calls; their reports are heard from the beginning."""
    names = {f"running-{number}" for number in range(2)}
    for name in names:
        (held / name).write_text("8")
    jobs = json.dumps([job(name, pause=0.2, steps=12, hold=held) for name in sorted(names)])
    command = [str(APP / "session_driver.py"), str(tmp_path), jobs]
    process = driver.start(command)
    driver.wait_for_steps(control_plane, tmp_path, jobs=2, steps=2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    spawned = driver.events(tmp_path, "spawn")
    process = driver.start(command)
    while process.printed().count("] attached") < 2:
        assert process.poll() is None, process.printed()
        time.sleep(0.02)
    for name in names:
        (held / name).unlink()
    printed = driver.finish(process)
    assert driver.events(tmp_path, "spawn") == spawned and printed.count("] attached") == 2
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    for number in range(2):
        heard = [one for line in lines if line.get("reports") == number for one in line["lines"]]
        assert [one["step"] for one in heard] == list(range(12))
    assert steps(names, control_plane) == {name: [list(range(12))] for name in names}


@pytest.mark.slow
def test_a_session_waits_while_modal_is_away(tmp_path: Path, control_plane: LocalModal) -> None:
    session = open_session(tmp_path, total=2)
    session.start(0, job("away-0", pause=0.3, steps=10))
    control_plane.down(6)
    session.start(1, job("away-1"))
    seen = Seen(session).until(lambda seen: len(seen.ends) == 2)
    assert {outcome(returned) for returned in seen.ends.values()} == {"1.0"}
    assert steps({"away-0"}, control_plane) == {"away-0": [list(range(10))]}
    session.close()


def test_a_progress_file_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = Tail(path, ["eval/a", "eval/b"], most=2)
    assert tail.look().last == {}
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "eval/a": 5}\n{"step": 2, "lo')
    assert tail.look().last == {"step": 1, "eval/a": 5}
    assert list(tail.reports) == [{"step": 1, "eval/a": 5}]
    with path.open("a") as file:
        file.write('ss": 1.5}\nno json\n[1]\n')
    assert tail.look().last == {"step": 2, "loss": 1.5}
    with path.open("a") as file:
        file.writelines(f'{{"step": {step}, "eval/b": 0, "other": 1}}\n' for step in (3, 4, 5))
    assert list(tail.look().reports) == [{"step": 4, "eval/b": 0}, {"step": 5, "eval/b": 0}]
    every = Tail(path, ["eval/a", "eval/b"], most=None)
    assert len(every.look().reports) == 4
    partial = tmp_path / "partial"
    partial.write_text('{"step": 1, "eval/a": 6}\n' * 40)
    strange = Tail(path, ["eval/a", "eval/b"], strange=True)
    assert not strange.look().last and not strange.reports and strange.is_strange
    partial.replace(path)  # written anew, and longer
    assert list(strange.look().reports) == [{"step": 1, "eval/a": 6}] * 40
    assert list(tail.look().reports) == [{"step": 1, "eval/a": 6}] * 2
    assert list(every.look().reports) == [{"step": 1, "eval/a": 6}] * 40
    path.write_text('{"step": 9, "eval/a": 7}\n')  # in its place, and shorter
    assert list(every.look().reports) == [{"step": 9, "eval/a": 7}]
