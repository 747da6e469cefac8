"""What a study refuses, its samplers, and the searches that come along."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import warm
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from hydra_sweeps.errors import SweepError
from hydra_sweeps.record import Outcome
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.leases import LEASE
from hydra_sweeps.study.trials import (
    ERROR,
    RUN,
    TWIN,
    best_trials,
    connection,
    new_sampler,
    stored_outcome,
    write_results,
)
from tests.study_app.here import STUDY, composed, first, journal, study

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "hydra_plugins" / "experiment_sweeper"


@pytest.fixture(autouse=True)
def fresh_hydra(hydra_restore_singletons: Any) -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.names=[a,b]",
             "hydra/sweeper/pruner=median"],
            "pruner=MedianPruner and hydra.sweeper.direction with 2 objectives do not go together",
        ),
        (
            ["hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.names=[a]"],
            r"hydra\.sweeper\.names=\['a'\]",
        ),
        (["hydra.sweeper.names=[]"], "needs a value to search by"),
        (["hydra.sweeper.direction=up"], "must be maximize or minimize"),
        (["hydra.sweeper.names=[a,b]"], "a list with a direction for each"),
        (["hydra/sweeper/pruner=median", "hydra.sweeper.progress_metric=null"], "progress_metric"),
        (["hydra.sweeper.n_jobs=0"], "n_jobs=0 must be at least 1"),
        (["hydra.sweeper.repeats=3"], "repeats=3 is for hydra/sweeper=experiment"),
        (["hydra.sweeper.max_failure_rate=2"], "from 0 to 1"),
        (
            ["hydra/sweeper/sampler=grid", "+hydra.sweeper.sampler.search_space={x: [1]}"],
            "sampler.search_space is no option of a grid",
        ),
        (["hydra.sweeper.search_space={x: {type: int}}"], "write it as hydra.sweeper.params"),
        ([first("x=7")], r"warm_start\[0\]='x=7': x=7 lies outside"),
        (["kid=a,b"], "run 0 .* cannot be composed.*kid"),
        (["hydra.sweeper.name_key=null", "hydra.sweep.subdir=one"], "all trials would write to"),
        (["hydra.sweeper.record.x=${nothing}"], "nothing"),
        (["hydra.sweeper.storage=sqlite:////nowhere/at/all.db"], "cannot be opened"),
        (["hydra.sweeper.storage=postgresql://127.0.0.1:9/x"], "//127.0.0.1:9/x cannot be opened"),
        (
            ["hydra.sweeper.storage=postgresql://127.0.0.1:9/x", "hydra.sweeper.dry_run=true"],
            "//127.0.0.1:9/x cannot be opened",
        ),
        (["hydra.sweeper.custom_search_space=tests.study_app.toy.broken"], "toy.broken: KeyError"),
        (["hydra.sweeper.custom_search_space=tests.study_app.toy.leaves"], "leaves: SystemExit: 3"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        study(tmp_path, "x=interval(0.0,6.0)", "hydra.sweeper.n_trials=1", *options)
    assert isinstance(caught.value, CompactHydraException) or "record" in options[0]
    assert not journal(tmp_path)


def test_values_that_nobody_has_named(tmp_path: Path) -> None:
    """As in a file for hydra-optuna-sweeper, which has no names."""
    study(tmp_path, "x=interval(0.0,6.0)", "act=pair", "steps=0", "hydra.sweeper.n_trials=1",
          "hydra.sweeper.direction=[maximize,minimize]")  # fmt: skip
    objectives = json.loads((tmp_path / "sweep.json").read_text())["objectives"]
    assert objectives == [
        {"name": "value_0", "direction": "maximize"}, {"name": "value_1", "direction": "minimize"}
    ]  # fmt: skip


def test_another_space_than_the_study_has(tmp_path: Path) -> None:
    study(tmp_path, "kind=a,b", "hydra.sweeper.n_trials=1")
    with pytest.raises(CompactHydraException, match="does not fit to what is searched now"):
        study(tmp_path, "kind=a,c", "hydra.sweeper.n_trials=2")


def test_a_new_study_counts_its_own_seconds(tmp_path: Path) -> None:
    """Beside the sweep.json of one that was thrown away, whose runs have the same names."""
    options = ["x=1", "hydra.sweeper.n_trials=1"]
    study(tmp_path, *options)
    (tmp_path / "study.db").unlink()
    connection.cache_clear()  # another process would have none
    file = tmp_path / "sweep.json"
    content = json.loads(file.read_text())
    content["runs"][0]["seconds"] = 3600.0
    file.write_text(json.dumps(content))
    study(tmp_path, *options)
    [run] = json.loads(file.read_text())["runs"]
    assert run["name"] == content["runs"][0]["name"] and run["seconds"] < 600


def test_samplers(tmp_path: Path) -> None:
    context = composed(tmp_path, *STUDY, "x=interval(0.0,1.0)")[1]
    options = OptunaAsyncConf(sampler=context.hydra.sweeper.sampler, pruner=None)
    assert new_sampler(options, 0)._constant_liar is True
    assert new_sampler(replace(options, n_jobs=1), 0)._constant_liar is False
    given = OmegaConf.create({**options.sampler, "constant_liar": False})
    assert new_sampler(replace(options, sampler=given), 0)._constant_liar is False
    ours = [*FILES.glob("_samplers/hydra/sweeper/sampler/*.yaml")]
    assert len(ours) == 5
    for file in ours:
        chosen = composed(tmp_path, *STUDY, f"hydra/sweeper/sampler={file.stem}")[1]
        stored = new_sampler(replace(options, sampler=chosen.hydra.sweeper.sampler), 3)
        sampler = new_sampler(replace(options, sampler=OmegaConf.load(file)), 3)
        assert type(sampler) is type(stored) and sampler


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("+hydra.sweeper.sampler.sed=1", "hydra.sweeper.sampler: .*unexpected keyword .*'sed'"),
        ("+hydra.sweeper.pruner.sed=1", "hydra.sweeper.pruner: .*unexpected keyword .*'sed'"),
    ],
)
def test_an_option_that_optuna_does_not_have(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(SweepError, match=message) as caught:
        study(tmp_path, "x=interval(0.0,6.0)", "hydra/sweeper/pruner=median", option)
    assert "\n" not in str(caught.value) and not journal(tmp_path)


def test_packages_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = "x=interval(0.0,6.0)"
    versions = {"optuna": "2.10.1", "sqlalchemy": "2.1.9"}
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: versions[name])
        with pytest.raises(SweepError, match=r"SQLAlchemy 2\.1\.9: pip install"):
            study(tmp_path, x)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SweepError, match=r"needs Optuna .*pip install -c constraints\.txt"):
        study(tmp_path, x)


@pytest.mark.parametrize("directions", [["maximize"], ["minimize"], ["maximize", "minimize"]])
def test_the_best_is_a_trial_that_ran_and_lies_where_it_ran(
    directions: list[str], tmp_path: Path
) -> None:
    """Not one that has its result, whichever came first; of several objectives the front."""
    made = optuna.create_study(directions=directions)
    ends = [(TWIN, 1.0, 2.0), ("ran", 1.0, 2.0), ("worse", 0.5, 3.0), ("other", 0.9, 1.0)]
    for name, *values in ends:
        trial, first = made.ask(), values[:1] if directions != ["minimize"] else values[1:]
        trial.set_user_attr(TWIN if name == TWIN else RUN, name)
        trial.set_user_attr(LEASE, {"folder": "/there"})
        made.tell(trial, first if len(directions) == 1 else values)
    expected = {"maximize": [1], "minimize": [3]}[directions[0]] + [3] * (len(directions) > 1)
    assert [trial.number for trial in best_trials(made)] == expected
    write_results(made, tmp_path)
    results: Any = OmegaConf.load(tmp_path / "optimization_results.yaml")
    found = results.get("solutions") or [{"directory": results.best_directory}]
    names = [ends[number][0] for number in expected]
    assert [solution["directory"] for solution in found] == [f"/there/{name}" for name in names]


def test_a_reason_without_its_end_is_forgotten() -> None:
    """A kill came between the two, and the trial went well when it ran again."""
    made = optuna.create_study()
    trial = made.ask()
    trial.set_user_attr(ERROR, "out of memory")
    assert stored_outcome(made.trials[0]) == Outcome("planned")
    made.tell(trial, 1.0)
    assert stored_outcome(made.trials[0]) == Outcome("completed", 1.0)


def test_hydra_loads_no_optuna() -> None:
    code = (
        "import sys, hydra_plugins.experiment_sweeper.optuna_async as a;"
        "assert not {'optuna', 'sqlalchemy', 'multiprocessing'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def of(*options: str) -> str:
    """What train.py prints for a search."""
    done = warm.run(["train.py", "-m", *options], kind="apps")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_searches_that_come_along(tmp_path: Path) -> None:
    dry = ["hydra.sweeper.dry_run=true", f"paths.checkpoints={tmp_path}"]
    plain = of("hparams_search=opd", *dry)
    assert plain.endswith("\n24 runs\n") and "lr: float 1e-05 to 0.0003, log" in plain
    assert plain.count("first: ") == 4 and "maximize simulated_length" in plain
    rates = "lr=tag(log,interval(5e-4,5e-3))"
    tiny = of("experiment=quickstart", "hparams_search=opd", rates, *dry)
    assert "lr: float 0.0005 to 0.005, log" in tiny and tiny.count("first: ") == 4
    cost = of("hparams_search=opd_cost", *dry)
    assert cost.endswith("\n32 runs\n")
    assert "maximize simulated_length, minimize gpu_hours" in cost


def test_a_variable_that_only_an_ignored_key_reads(tmp_path: Path) -> None:
    """It is no part of what a trial measures, so it may be missing here, as in a grid."""
    one = ["x=choice(1,2)", "hydra.sweeper.n_trials=1", "+note=${oc.env:NOWHERE_SET}"]
    with pytest.raises(SweepError, match="NOWHERE_SET"):
        study(tmp_path, *one)
    assert len(study(tmp_path, *one, "hydra.sweeper.ignore=[note]")) == 1
