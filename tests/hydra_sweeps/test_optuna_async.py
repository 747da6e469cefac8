"""Studies with real jobs: what is recorded, what a second start does, how it ends."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import warm
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf
from test_processes import alive

from hydra_sweeps.errors import SweepError
from hydra_sweeps.study.trials import connection
from tests.study_app.here import STUDY, first, journal, study, wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_hydra(hydra_restore_singletons: Any) -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def trials_of(folder: Path) -> list[Any]:
    storage = connection(f"sqlite:///{folder / 'study.db'}")  # waits for who writes meanwhile
    [summary] = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage).get_trials()


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in trials_of(folder)]


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return content


def controller(folder: Path, *overrides: str) -> warm.Started:
    """A study in a process of its own."""
    script = str(ROOT / "tests/study_app/toy.py")
    options = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${run_name}", *STUDY, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return warm.start([script, "-m", *options], cwd=folder.parent, env=environment)


def test_a_study_and_what_it_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampled = ["x=interval(0.0,6.0)", "kind=a,b", "gamma=1"]
    returned = study(tmp_path, *sampled, "hydra.sweeper.n_trials=4")
    trials = trials_of(tmp_path)
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert [result.return_value for result in returned] == [trial.value for trial in trials]
    assert all(trial.user_attrs["gamma"] == "1" for trial in trials)
    best = max(trials, key=lambda trial: trial.value)
    results = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert results == {
        "name": "optuna",
        "best_params": best.params,
        "best_value": best.value,
        "best_trial": best.number,
        "best_directory": str(tmp_path / best.user_attrs["hydra.run"]),
    }
    assert (tmp_path / "multirun.yaml").exists()
    content = record(tmp_path)
    assert (content["kind"], content["state"]) == ("study", "complete")
    assert content["objectives"] == [{"name": "value", "direction": "maximize"}]
    assert content["study"]["best"] == [best.number] and content["study"]["n_trials"] == 4
    for run, trial in zip(content["runs"], trials, strict=True):
        x, kind = trial.params["x"], trial.params["kind"]
        assert run["name"] == f"toy_x{x:.3g}_{kind}_trial{run['number']}"
        assert (run["number"], run["value"]) == (trial.number, trial.value)
        assert run["params"] == trial.params and run["record"] == {"x": trial.params["x"]}
        assert f"x={trial.params['x']}" in run["command"] and "gamma=1" in run["command"]
        hydra = OmegaConf.load(tmp_path / run["name"] / ".hydra/hydra.yaml")
        assert hydra.hydra.job.num == trial.number
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(index for index, line in enumerate(table) if line[:1] == ["rank"])
    assert table[header + 1][:2] == ["1", best.user_attrs["hydra.run"]]


def test_n_trials_is_a_total(tmp_path: Path) -> None:
    sampled = ["x=interval(0.0,6.0)", "+hydra.sweeper.sampler.seed=1"]
    assert len(study(tmp_path, *sampled, "hydra.sweeper.n_trials=2")) == 2
    assert study(tmp_path, *sampled, "hydra.sweeper.n_trials=2") == []
    assert len(study(tmp_path, *sampled, "hydra.sweeper.n_trials=5")) == 3
    trials = trials_of(tmp_path)
    assert [trial.number for trial in trials] == list(range(5))
    assert len({trial.params["x"] for trial in trials}) == 5  # a seed does not draw them again
    assert len(record(tmp_path)["runs"]) == 5


def test_bad_trials_are_recorded_and_end_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acts = ["nans", "raise", "kill", "exit", "pair", "value"]
    returned = study(
        tmp_path,
        f"act={','.join(acts)}",
        first(*(f"act={act}" for act in acts)),
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.n_jobs=3",
    )
    assert states(tmp_path) == ["FAIL"] * 5 + ["COMPLETE"]
    assert len(returned) == 6 and returned[2].status == JobStatus.FAILED
    errors = [run["error"] for run in record(tmp_path)["runs"]]
    reasons = ["nan", "ValueError: this job", "SIGKILL", "exit code 7", "not a number"]
    for error, reason in zip(errors, reasons, strict=False):
        assert reason in error and "\n" not in error
    assert errors[5] is None and record(tmp_path)["study"]["best"] == [5]
    attrs = [trial.user_attrs.get("hydra.error") for trial in trials_of(tmp_path)]
    assert attrs == errors
    assert "SIGKILL" in capsys.readouterr().out


def test_all_trials_failed(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="none of 2 trials completed; the first: ValueError: this"):
        study(tmp_path, "x=interval(0.0,1.0)", "act=raise", "hydra.sweeper.n_trials=2")
    assert states(tmp_path) == ["FAIL", "FAIL"]
    assert OmegaConf.load(tmp_path / "optimization_results.yaml") == {"name": "optuna"}


def test_max_failure_rate_counts_over_the_study(tmp_path: Path) -> None:
    options = ["x=interval(0.0,1.0)", "act=raise", "hydra.sweeper.n_jobs=1",
            "hydra.sweeper.n_trials=8", "hydra.sweeper.max_failure_rate=0.25"]  # fmt: skip
    with pytest.raises(SweepError, match=r"3 of 3 trials failed, more than .*=0.25 of n_trials=8"):
        study(tmp_path, *options)
    assert states(tmp_path) == ["FAIL"] * 3


def test_a_job_that_is_worse_is_pruned(tmp_path: Path) -> None:
    for name in ("go-0", "go-0-1", "go-0-2"):  # the second trial waits after its first step
        (tmp_path / name).touch()
    returned = study(
        tmp_path,
        "x=interval(0.0,6.0)",
        "steps=3",
        first("x=3.0", "x=0.0", "x=0.0"),
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=1",
        "hydra/sweeper/pruner=median",
        "hydra.sweeper.pruner.n_startup_trials=1",
    )
    good, bad, again = trials_of(tmp_path)
    assert (good.state.name, bad.state.name) == ("COMPLETE", "PRUNED")
    assert again.state.name == "PRUNED" and again.user_attrs["hydra.twin"] == 1  # not trained
    assert set(good.intermediate_values) == {1, 2, 3} and set(bad.intermediate_values) == {1}
    lines = [" ".join(line[:2]) for line in journal(tmp_path)]
    assert lines == ["start 0", "end 0", "start 1"]
    run = record(tmp_path)["runs"][1]
    assert (run["status"], run["value"], run["error"]) == ("pruned", None, "pruned at step 1")
    assert len(returned) == 2


def test_a_trial_that_was_being_pruned_is_pruned(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    name = "/".join(tmp_path.parts[-2:])
    earlier = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    trial = earlier.ask()
    trial.suggest_float("x", 0.0, 6.0)
    trial.set_user_attr("hydra.run", "toy_trial0")
    trial.set_user_attr("hydra.overrides", ["x=1.0", "steps=2", "run_name=toy_trial0"])
    trial.report(-1.0, 1)
    trial.set_user_attr("hydra.stopped", 1)
    (tmp_path / "go-1-0").touch()
    study(tmp_path, "x=interval(0.0,6.0)", "steps=1", "hydra.sweeper.n_trials=2")
    assert states(tmp_path) == ["PRUNED", "COMPLETE"]


def test_conditional_keys(tmp_path: Path) -> None:
    study(
        tmp_path,
        "kind=a,b",
        first("kind=a", "kind=b beta=0.5"),
        "hydra.sweeper.n_trials=3",
        conditional={"kind=b": {"beta": "interval(0.0,1.0)"}},
    )
    zeroth, second, third = trials_of(tmp_path)
    assert zeroth.params == {"kind": "a"} and second.params == {"kind": "b", "beta": 0.5}
    assert ("beta" in third.params) == (third.params["kind"] == "b")
    starts = {line[1]: line[4:] for line in journal(tmp_path) if line[0] == "start"}
    assert starts["0"] == ["a", "0.0"] and starts["1"] == ["b", "0.5"]


def test_first_points_are_only_for_new_studies(tmp_path: Path) -> None:
    x = "x=interval(0.0,6.0)"
    study(tmp_path, x, first("x=1", "x=2"), "hydra.sweeper.n_trials=1")
    assert states(tmp_path) == ["COMPLETE", "WAITING"]
    study(tmp_path, x, first("x=4", "x=5", "x=6"), "hydra.sweeper.n_trials=3")
    assert [trial.params["x"] for trial in trials_of(tmp_path)][:2] == [1.0, 2.0]
    assert trials_of(tmp_path)[2].params["x"] not in (4.0, 5.0, 6.0)


def test_several_objectives(tmp_path: Path) -> None:
    two = ["hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.names=[value,cost]",
           "hydra.sweeper.n_trials=3", "x=interval(0.0,6.0)"]  # fmt: skip
    study(tmp_path, *two, "act=pair", "steps=0")
    content = record(tmp_path)
    assert content["objectives"][1] == {"name": "cost", "direction": "minimize"}
    assert all(run["value"][1] == 2.0 for run in content["runs"])
    results = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert [solution.trial for solution in results.solutions] == content["study"]["best"]
    assert results.solutions[0]["values"] == content["runs"][content["study"]["best"][0]]["value"]
    with pytest.raises(SweepError, match="not 2 numbers"):
        study(tmp_path / "wrong", *two, "act=value")
    with pytest.raises(SweepError, match="has other directions"):
        study(tmp_path, "x=interval(0.0,6.0)")


def test_custom_search_space(tmp_path: Path) -> None:
    custom = "hydra.sweeper.custom_search_space=tests.study_app.toy.more"
    study(tmp_path, "kind=a,b", custom, "hydra.sweeper.n_trials=2",
          first("kind=a", "kind=b"))  # fmt: skip
    zeroth, second = trials_of(tmp_path)
    assert "gamma" not in zeroth.params and 5 <= second.params["gamma"] <= 6
    job = OmegaConf.load(tmp_path / second.user_attrs["hydra.run"] / ".hydra/config.yaml")
    assert job.gamma == second.params["gamma"]


def test_grid_sampler(tmp_path: Path) -> None:
    grid = ["kind=a,b", "x=range(1,3)", "hydra/sweeper/sampler=grid"]
    study(tmp_path, *grid, "hydra.sweeper.n_trials=4")
    study(tmp_path, *grid, "hydra.sweeper.n_trials=100")
    points = [(trial.params["kind"], trial.params["x"]) for trial in trials_of(tmp_path)]
    assert points == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]
    assert states(tmp_path) == ["COMPLETE"] * 6


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["x=interval(0.0,6.0)", "gamma=1", first("x=1")]
    study(tmp_path, *options, "hydra.sweeper.dry_run=true", "hydra.sweeper.n_trials=5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "x: float 0.0 to 6.0" and lines[-1] == "5 runs"
    assert "all jobs: gamma=1" in lines and "first: x=1.0" in lines
    assert list(tmp_path.iterdir()) == []
    study(tmp_path, *options, "hydra.sweeper.n_trials=2")
    capsys.readouterr()
    study(tmp_path, *options, "hydra.sweeper.dry_run=true", "hydra.sweeper.n_trials=5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "3 runs" and any("2 completed" in line for line in lines)
    assert len(trials_of(tmp_path)) == 2


def test_a_lost_sweep_json_is_made_again(tmp_path: Path) -> None:
    x = "x=interval(0.0,6.0)"
    study(tmp_path, x, "hydra.sweeper.n_trials=2")
    before = record(tmp_path)["runs"]
    (tmp_path / "sweep.json").unlink()
    study(tmp_path, x, "hydra.sweeper.n_trials=2")
    after = record(tmp_path)["runs"]
    keys = ("number", "name", "overrides", "status", "value", "params", "record", "digest")
    assert [[run[key] for key in keys] for run in after] == [
        [run[key] for key in keys] for run in before
    ]


def test_a_study_named_in_its_runs(tmp_path: Path) -> None:
    options = ["x=interval(0.0,6.0)", "hydra.sweeper.n_trials=1", "hydra.sweeper.study_name=lr/2"]
    study(tmp_path, *options)
    [run] = record(tmp_path)["runs"]
    assert run["name"].endswith("_lr-2_trial0") and record(tmp_path)["study"]["name"] == "lr/2"


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_kill_9_again_and_again(tmp_path: Path, kills: int) -> None:
    options = ["x=interval(0.0,6.0)", "kind=a,b", "steps=2", "hydra.sweeper.n_trials=6"]
    steps = [["go-0"], ["go-0-1"], ["go-1-1", "go-2-1"]]
    for files in steps[:kills]:
        before = len(journal(tmp_path))
        process = controller(tmp_path, *options)
        wait_for(lambda before=before: len(journal(tmp_path)) >= before + 2, process)  # type: ignore[misc]
        for name in files:
            (tmp_path / name).touch()
        if files[0] == "go-0":  # the next process finds a step that was taken, and one reported
            wait_for(lambda: len([*tmp_path.glob("*/progress.jsonl")]) == 2, process)
            wait_for(
                lambda: any(trial.intermediate_values for trial in trials_of(tmp_path)), process
            )
        else:  # in the end there is a trial that nothing lets go on
            least = 4 if "go-2-1" in files else 1
            wait_for(
                lambda least=least: (  # type: ignore[misc]
                    "COMPLETE" in states(tmp_path) and len(states(tmp_path)) >= least
                ),
                process,
            )
        process.kill()
        process.communicate()
    assert "RUNNING" in states(tmp_path)
    (tmp_path / "go").touch()
    last = controller(tmp_path, *options)
    assert last.wait(300) == 0, last.communicate()
    last.communicate()
    trials = trials_of(tmp_path)
    assert [(trial.number, trial.state.name) for trial in trials] == [
        (number, "COMPLETE") for number in range(6)
    ]
    assert all(set(trial.intermediate_values) == {1, 2} for trial in trials)
    lines = journal(tmp_path)
    for trial in trials:
        own = [line for line in lines if line[1] == str(trial.number)]
        starts = {tuple(line[3:]) for line in own if line[0] == "start"}
        assert starts == {(str(trial.params["x"]), trial.params["kind"], "0.0")}
        progress = tmp_path / trial.user_attrs["hydra.run"] / "progress.jsonl"
        assert [json.loads(line)["step"] for line in progress.open()] == [1, 2]
        assert any(line[0] == "end" for line in own)
    assert [run["number"] for run in record(tmp_path)["runs"]] == list(range(6))
    assert {run["status"] for run in record(tmp_path)["runs"]} == {"completed"}
    assert len([*tmp_path.glob("toy_*_trial*")]) == 6


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_an_interrupted_study_continues(tmp_path: Path, number: int, code: int) -> None:
    options = ["x=interval(0.0,6.0)", "steps=1", "hydra.sweeper.n_trials=3"]
    process = controller(tmp_path, *options)
    wait_for(lambda: len(journal(tmp_path)) == 2, process)
    with pytest.raises(SweepError, match=f"another process .*{process.pid}"):
        study(tmp_path, *options)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "interrupted; the same command continues" in err and "Traceback" not in err
    assert states(tmp_path) == ["RUNNING", "RUNNING"]
    assert record(tmp_path)["state"] == "interrupted"
    assert {run["status"] for run in record(tmp_path)["runs"]} == {"planned"}
    pids = [int(line[2]) for line in journal(tmp_path)]
    assert not any(map(alive, pids))
    params = [trial.params for trial in trials_of(tmp_path)]
    (tmp_path / "go").touch()
    study(tmp_path, *options)
    assert states(tmp_path) == ["COMPLETE"] * 3
    assert [trial.params for trial in trials_of(tmp_path)][:2] == params


def test_a_trial_killed_before_it_was_sampled(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    name = "/".join(tmp_path.parts[-2:])
    earlier = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    earlier.enqueue_trial({"x": 2.0})
    earlier.ask()
    earlier.ask().suggest_categorical("kind", ["a", "b"])
    study(tmp_path, "kind=a,b", "x=interval(0.0,6.0)", "hydra.sweeper.n_trials=2")
    zeroth, second = trials_of(tmp_path)
    assert zeroth.params["x"] == 2.0 and set(second.params) == {"kind", "x"}
    assert states(tmp_path) == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    "name",
    ["median", *(pytest.param(name, marks=pytest.mark.slow)
                 for name in ("hyperband", "successive_halving"))],
)  # fmt: skip
def test_pruners_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "go").touch()
    study(tmp_path, "x=interval(0.0,6.0)", "steps=2", f"hydra/sweeper/pruner={name}",
          "hydra.sweeper.n_trials=2")  # fmt: skip
    assert set(states(tmp_path)) <= {"COMPLETE", "PRUNED"}
    assert record(tmp_path)["study"]["pruner"].lower().startswith(name.replace("_", ""))


def test_a_point_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small space ends when all of it is measured, whatever n_trials says."""
    options = ["x=1,2", "kind=a,b", "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=40"]
    returned = study(tmp_path, *options)
    starts = [tuple(line[3:5]) for line in journal(tmp_path) if line[0] == "start"]
    assert len(starts) == len(set(starts)) == len(returned) == 4
    trials = trials_of(tmp_path)
    assert 4 <= len(trials) < 40 and {trial.state.name for trial in trials} == {"COMPLETE"}
    printed = capsys.readouterr().out
    assert f"all 4 points are measured: {len(trials)} trials, not 40" in printed
    for trial in trials:  # what was asked for twice has the result of its point
        assert trial.value == -((trial.params["x"] - 3) ** 2) - 0.25
    assert len(record(tmp_path)["runs"]) == 4
    [best] = record(tmp_path)["study"]["best"]
    assert "hydra.twin" not in trials[best].user_attrs and trials[best].params["x"] == 2
    assert study(tmp_path, *options) == []
    more = ["gamma=1", "hydra.sweeper.alike=false", f"hydra.sweeper.n_trials={len(trials) + 1}"]
    study(tmp_path, *options, *more)
    assert len(journal(tmp_path)) == 10  # another configuration is another point


def test_a_point_in_flight_is_waited_for(tmp_path: Path) -> None:
    """Also when it fails: then the next one runs."""
    options = ["kind=a,b", first("kind=a", "kind=a", "kind=a"), "hydra.sweeper.n_jobs=3"]
    study(tmp_path / "one", *options, "hydra.sweeper.n_trials=3")
    starts = [line[1] for line in journal(tmp_path / "one") if line[0] == "start"]
    assert starts == ["0"] and states(tmp_path / "one") == ["COMPLETE"] * 3
    bad = ["act=raise", "bad=0", "hydra.sweeper.n_trials=3"]
    study(tmp_path / "two", *options, *bad)
    starts = [line[1] for line in journal(tmp_path / "two") if line[0] == "start"]
    assert starts == ["0", "1"] and states(tmp_path / "two") == ["FAIL", "COMPLETE", "COMPLETE"]
