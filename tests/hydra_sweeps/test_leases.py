"""Several processes, one study: each trial is run by one of them."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import warm
from hydra.core.global_hydra import GlobalHydra

from hydra_sweeps.study import leases, run
from hydra_sweeps.study.leases import LEASE, Leases, born, machine
from hydra_sweeps.study.trials import OVERRIDES, POINT, RUN, TWIN
from tests.study_app.here import STUDY, first, journal, study, wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_hydra(hydra_restore_singletons: Any) -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def shared(folder: Path) -> list[str]:
    """The options that make studies in different folders one study."""
    return [f"hydra.sweeper.storage=sqlite:///{folder / 'shared.db'}", "hydra.sweeper.study_name=s"]


def trials_of(folder: Path) -> list[Any]:
    """Without those that a process asked for and gave back, for another had taken the last one."""
    try:
        study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'shared.db'}")
    except Exception:  # another process is just making it
        return []
    return [trial for trial in study.get_trials() if trial.user_attrs.get(LEASE) != {}]


def process(folder: Path, name: str, *overrides: str) -> warm.Started:
    """One of several."""
    own = [f"hydra.sweep.dir={folder / name}", "hydra.sweep.subdir=${run_name}"]
    options = [*own, *STUDY, *shared(folder), *overrides]
    command = [str(ROOT / "tests/study_app/toy.py"), "-m", *options]
    return warm.start(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})


def starts(folder: Path, *names: str) -> list[str]:
    return [line[1] for name in names for line in journal(folder / name) if line[0] == "start"]


@pytest.mark.slow
def test_a_seed_is_as_written_for_who_makes_the_study(tmp_path: Path) -> None:
    """Whoever joins draws other points."""
    options = [*shared(tmp_path), "x=interval(0.0,6.0)", "steps=0", "hydra.sweeper.n_jobs=1",
               "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=7"]  # fmt: skip
    study(tmp_path / "a", *options, "hydra.sweeper.n_trials=2")
    study(tmp_path / "b", *options, "hydra.sweeper.n_trials=3")
    written = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
    expected = [written.ask().suggest_float("x", 0.0, 6.0) for _ in range(3)]
    drawn = [trial.params["x"] for trial in trials_of(tmp_path)]
    assert drawn[:2] == expected[:2] and drawn[2] not in expected


@pytest.mark.slow
def test_three_processes_and_one_is_killed(tmp_path: Path) -> None:
    """Every trial ends once; those of the killed one are continued, no other is."""
    options = ["x=interval(0.0,6.0)", "steps=1", "hydra.sweeper.n_trials=8"]
    names = ["a", "b", "c"]
    running = {name: process(tmp_path, name, *options) for name in names}
    for name in names:
        wait_for(lambda name=name: len(starts(tmp_path, name)) == 2, running[name])  # type: ignore[misc]
    lost = starts(tmp_path, "c")
    assert len({*starts(tmp_path, *names)}) == 6
    running["c"].send_signal(signal.SIGKILL)
    running["c"].communicate()
    for name in names:
        (tmp_path / name / "go").touch()
    for name in ("a", "b"):
        printed, errors = running[name].communicate(timeout=300)
        assert running[name].returncode == 0, printed + errors
        assert "Traceback" not in printed + errors
    trials = trials_of(tmp_path)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 8
    assert len({trial.params["x"] for trial in trials}) == 8
    counts = {str(n): starts(tmp_path, *names).count(str(n)) for n in range(8)}
    assert counts == {str(n): 2 if str(n) in lost else 1 for n in range(8)}
    folders = [trial.user_attrs[LEASE]["folder"] for trial in trials]
    assert {*folders} == {str(tmp_path / "a"), str(tmp_path / "b")}
    for trial, folder in zip(trials, folders, strict=True):
        assert (Path(folder) / trial.user_attrs["hydra.run"] / "progress.jsonl").exists()


@pytest.mark.parametrize("kept", ["here", pytest.param("shared", marks=pytest.mark.slow)])
def test_killed_behind_any_write_to_a_trial(
    tmp_path: Path, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a trial says is written piece by piece; a process that reads between two goes on."""
    monkeypatch.setattr(leases, "ENDED", 2.0)
    whole = False
    for number in range(20):
        folder = tmp_path / str(number)
        options = ["x=interval(0.0,6.0)", "steps=0", "hydra.sweeper.n_trials=1"]
        options += shared(folder) if kept == "shared" else []
        folder.mkdir()
        if (child := os.fork()) == 0:
            whole = study_until(number, folder / "a", *options)
            os._exit(0 if whole else 9)
        whole = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        study(folder / ("b" if kept == "shared" else "a"), *options)
        if kept == "shared":
            assert [trial.state.name for trial in trials_of(folder)] == ["COMPLETE"]
        if whole:
            break
    assert whole and number > 3


@pytest.mark.slow
def test_a_trial_that_takes_anothers_result_hides_no_run(tmp_path: Path) -> None:
    """A process that is stopped behind any of its writes; what another one says meanwhile."""
    options = ["x=interval(0.0,6.0)", "steps=0", first("x=1.5", "x=1.5"), *shared(tmp_path)]
    options += ["hydra.sweeper.n_trials=2"]
    if (child := os.fork()) == 0:
        with_stops(TWIN, RUN, OVERRIDES)
        study(tmp_path / "a", *options)
        os._exit(0)
    looks = 0
    while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
        looks += 1
        study(tmp_path / "b", *options)
        runs = json.loads((tmp_path / "b" / "sweep.json").read_text())["runs"]
        assert [(run["status"], run["value"]) for run in runs] == [("completed", -2.5)]
        os.kill(child, signal.SIGCONT)
    assert looks == 3 and os.waitstatus_to_exitcode(status) == 0
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE"] * 2


def with_stops(*keys: str) -> None:
    """From here on this process stops behind writes of these attributes to the second trial."""
    write = optuna.trial.Trial.set_user_attr

    def stopping(trial: Any, key: str, value: Any) -> None:
        write(trial, key, value)
        if trial.number == 1 and key in keys:
            os.kill(os.getpid(), signal.SIGSTOP)

    optuna.trial.Trial.set_user_attr = stopping  # type: ignore[method-assign]


def study_until(count: int, folder: Path, *options: str) -> bool:
    """Whether a study ends before it has written `count` attributes of trials; in a process of its
    own, which it leaves as a kill would."""
    write, left = optuna.trial.Trial.set_user_attr, [count]

    def until(trial: Any, key: str, value: Any) -> None:
        if not left[0]:
            os._exit(9)
        left[0] -= 1
        write(trial, key, value)

    optuna.trial.Trial.set_user_attr = until  # type: ignore[method-assign]
    study(folder, *options)
    return True


@pytest.mark.slow
def test_a_second_process_leaves_what_runs_alone(tmp_path: Path) -> None:
    """It ends when nothing is left to ask for, and says who is still at work."""
    options = ["x=interval(0.0,6.0)", "steps=1", "hydra.sweeper.n_trials=3"]
    first = process(tmp_path, "a", *options)
    wait_for(lambda: len(starts(tmp_path, "a")) == 2, first)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "go").touch()
    second = process(tmp_path, "b", *options)
    printed, errors = second.communicate(timeout=300)
    assert second.returncode == 0, printed + errors
    assert "#0, #1 run elsewhere" in printed and starts(tmp_path, "b") == ["2"]
    (tmp_path / "a" / "go").touch()
    printed, errors = first.communicate(timeout=300)
    assert first.returncode == 0, printed + errors
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE"] * 3


@pytest.mark.slow
def test_points_are_queued_once(tmp_path: Path) -> None:
    """By two processes that start at once."""
    options = ["x=1,2,3", "kind=a,b", "hydra/sweeper/sampler=grid"]
    both = [process(tmp_path, name, *options) for name in ("a", "b")]
    for one in both:
        printed, errors = one.communicate(timeout=300)
        assert one.returncode == 0, printed + errors
    points = [(t.params["x"], t.params["kind"]) for t in trials_of(tmp_path)]
    assert len(points) == len({*points}) == 6 and len(starts(tmp_path, "a", "b")) == 6


@pytest.mark.parametrize("when", ["before it signs", "while it writes"])
def test_another_process_fills_the_queue(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that had looked whose turn it was before this one signed, or signs after it."""
    points = [{"kind": "a"}, {"kind": "b"}]
    write, wait, came = optuna.study.Study.enqueue_trial, time.sleep, list[bool]()

    def other_comes(own: int) -> None:
        if not came:
            came.append(True)
            name, storage = "s", f"sqlite:///{tmp_path / 'shared.db'}"
            other = optuna.load_study(study_name=name, storage=storage)
            if own:
                Leases(False, "/of/another").write(other)
            for point in points[own:]:
                write(other, point)

    def written(study: optuna.Study, point: dict[str, Any]) -> None:
        write(study, point)
        other_comes(1)

    def waited(seconds: float) -> None:
        other_comes(0)
        wait(seconds)

    monkeypatch.setattr(run, "carry_out", lambda study: [])
    if when == "while it writes":
        monkeypatch.setattr(optuna.study.Study, "enqueue_trial", written)
    else:
        monkeypatch.setattr(time, "sleep", waited)
    study(tmp_path / "a", "kind=a,b", "hydra/sweeper/sampler=grid", *shared(tmp_path))
    assert came
    assert [trial.system_attrs["fixed_params"] for trial in trials_of(tmp_path)] == points


def test_a_point_that_another_process_was_faster_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began a later trial of it after this one was asked for, and before this one says what it
    is; its result counts for both."""
    write, wait, others = optuna.trial.Trial.set_user_attr, time.sleep, list[Any]()

    def written(trial: optuna.Trial, key: str, value: Any) -> None:
        if key == POINT and not others:
            storage = f"sqlite:///{tmp_path / 'shared.db'}"
            others.append(other := optuna.load_study(study_name="s", storage=storage).ask())
            Leases(False, str(tmp_path / "b")).write(other)
            said = {POINT: value, RUN: "other", OVERRIDES: ["kind=a", "run_name=other"]}
            for name, text in said.items():
                write(other, name, text)
        write(trial, key, value)

    def waited(seconds: float) -> None:
        wait(seconds)
        if others and trials_of(tmp_path)[0].user_attrs.get(POINT):
            others[0].study.tell(others[0], 7.0)

    monkeypatch.setattr(optuna.trial.Trial, "set_user_attr", written)
    monkeypatch.setattr(time, "sleep", waited)
    study(
        tmp_path / "a", "kind=a,b", first("kind=a"), *shared(tmp_path), "hydra.sweeper.n_trials=2"
    )
    own, other = trials_of(tmp_path)
    assert (own.value, other.value, own.user_attrs[TWIN]) == (7.0, 7.0, other.number)
    assert starts(tmp_path, "a") == []


@pytest.mark.parametrize("how", ["ended", "taken over"])
def test_a_trial_that_another_process_was_faster_with(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was gone when this one looked: it had ended the trial before, or a third has taken it."""
    made, other = optuna.trial.Trial.__init__, elsewhere(tmp_path, host=machine(), born="before")

    def comes(trial: optuna.Trial, *arguments: Any) -> None:
        made(trial, *arguments)
        if how == "ended":
            other.tell(0, 7.0)
        else:
            Leases(False, str(tmp_path / "b")).write(trial)

    monkeypatch.setattr(optuna.trial.Trial, "__init__", comes)
    study(tmp_path / "a", "x=interval(0.0,6.0)", *shared(tmp_path), "hydra.sweeper.n_trials=1")
    [trial] = trials_of(tmp_path)
    assert starts(tmp_path, "a") == []
    if how == "ended":
        assert trial.value == 7.0
    else:
        assert trial.user_attrs[LEASE]["folder"] == str(tmp_path / "b")


def test_a_queued_trial_that_two_processes_take_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find it waiting before one has written that it runs; who signs last has it."""
    kind, wait, others = optuna.storages.RDBStorage, time.sleep, list[Any]()
    look, take = kind.check_trial_is_updatable, kind.set_trial_state

    def looked(storage: Any, *arguments: Any) -> None:
        if others == [None]:
            others[0] = "asks"
            url = f"sqlite:///{tmp_path / 'shared.db'}"
            others.append(optuna.load_study(study_name="s", storage=url).ask())
        look(storage, *arguments)

    def taken(storage: Any, *arguments: Any) -> bool:
        others[:] = others or [None]
        return take(storage, *arguments)

    def waited(seconds: float) -> None:
        wait(seconds)
        if others:
            Leases(False, str(tmp_path / "b")).write(others[-1])

    monkeypatch.setattr(kind, "check_trial_is_updatable", looked)
    monkeypatch.setattr(kind, "set_trial_state", taken)
    monkeypatch.setattr(time, "sleep", waited)
    options = ["x=interval(0.0,6.0)", first("x=2.0"), "hydra.sweeper.n_trials=1"]
    study(tmp_path / "a", *options, *shared(tmp_path))
    [trial] = trials_of(tmp_path)
    assert (trial.number, trial.state.name) == (others[-1].number, "RUNNING")
    assert starts(tmp_path, "a") == []


def test_a_study_that_is_just_being_made(tmp_path: Path) -> None:
    """Optuna makes it first, and gives it directions then."""
    optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'shared.db'}").create_new_study("s")
    study(tmp_path / "a", "x=interval(0.0,6.0)", *shared(tmp_path), "hydra.sweeper.n_trials=1")
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE"]


def elsewhere(folder: Path, **lease: Any) -> optuna.Study:
    """A study with a trial that another machine runs."""
    storage = f"sqlite:///{folder / 'shared.db'}"
    other = optuna.create_study(storage=storage, study_name="s", direction="maximize")
    other.enqueue_trial({"x": 2.0})
    trial = other.ask()
    holder = {"host": "elsewhere", "pid": 1, "born": "1", "folder": "/there", "sign": 1}
    trial.set_user_attr(LEASE, {**holder, **lease})
    return other


def test_another_machine_that_gives_no_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere(tmp_path)
    monkeypatch.setattr(leases, "ENDED", 6.0)
    study(tmp_path / "a", "x=interval(0.0,6.0)", *shared(tmp_path), "hydra.sweeper.n_trials=2")
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE", "COMPLETE"]
    assert trials_of(tmp_path)[0].params["x"] == 2.0
    assert "#0 is of elsewhere" in capsys.readouterr().out


def test_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose process is gone, and by which clock."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    trial = optuna.create_study().ask()
    own = Leases(False, "/here")
    own.write(trial)
    assert own.is_own(trial) and own.state(trial) == "live"
    assert machine().startswith(socket.gethostname())
    child = subprocess.Popen(["sleep", "600"])
    here = {**own.holder, "pid": child.pid, "born": born(child.pid)}
    trial.set_user_attr(LEASE, here)
    assert own.state(trial) == "live" and not own.is_own(trial)
    trial.set_user_attr(LEASE, {**here, "born": "another process had this number"})
    assert own.state(trial) == "gone"
    trial.set_user_attr(LEASE, here)
    child.kill()
    child.wait()
    assert own.state(trial) == "gone"
    trial.set_user_attr(LEASE, {**here, "host": "elsewhere", "sign": 1})
    assert own.state(trial) == "unclear"
    now[0] += leases.ENDED - 1
    trial.set_user_attr(LEASE, {**here, "host": "elsewhere", "sign": 2})
    assert own.state(trial) == "live"
    now[0] += leases.ENDED + 1
    assert own.state(trial) == "gone"
    assert Leases(True, "/here").state(trial) == "gone"
    trial.set_user_attr(LEASE, {})
    assert Leases(False, "/here").state(trial) == "gone"
