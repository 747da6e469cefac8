"""A study ranks like with like, and what is told of a trial is its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from hydra_sweeps.errors import SweepError
from tests.study_app.here import first, study

X, ONE = "x=interval(0.0,6.0)", "hydra.sweeper.n_trials=1"
DRY = "hydra.sweeper.dry_run=true"


@pytest.fixture(autouse=True)
def fresh_hydra(hydra_restore_singletons: Any) -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def runs(folder: Path) -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return list(content["runs"])


def refused(folder: Path, *overrides: str) -> str:
    """Why the study does not go on, also in a dry run."""
    with pytest.raises(SweepError) as caught:
        study(folder, DRY, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_trials_of_other_options_are_no_comparison(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("prompts")
    inputs = f"hydra.sweeper.inputs=[{data}]"
    study(tmp_path, X, "beta=0.25", inputs, ONE)
    assert "#0 has beta=0.25, not 0.5)" in refused(tmp_path, X, "beta=0.5", inputs)
    assert "#0 has beta=0.25, not 0.0" in refused(tmp_path, X, inputs)
    assert "beta=0.25, not 0.5" in refused(tmp_path, "x=1,2", "beta=0.5", inputs)
    names = refused(tmp_path, X, "beta=0.25", inputs, "hydra.sweeper.names=[loss]")
    assert "has hydra.sweeper.names=['value'], this command ['loss']" in names
    metric = refused(tmp_path, X, "beta=0.25", inputs, "hydra.sweeper.progress_metric=loss")
    assert "progress_metric=eval/score" in metric
    for same in (
        [X, "beta=0.25"],
        ["x=interval(1.0,9.0)", "beta=interval(0.0,1.0)"],
        ["x=2.5", "beta=0.25", "kind=a,b"],
        ["~beta", "+beta=0.25", X],
        [X, "beta=0.5", "hydra.sweeper.alike=false"],
    ):
        study(tmp_path, DRY, inputs, *same)
    data.write_text("other prompts")
    assert "one of hydra.sweeper.inputs" in refused(tmp_path, X, "beta=0.25", inputs)


def test_a_key_that_is_made_anew_is_searched_on(tmp_path: Path) -> None:
    made_anew = ["~beta", "+beta=interval(0.0,1.0)", "steps=0"]
    study(tmp_path, *made_anew, ONE)
    study(tmp_path, *made_anew, DRY)


def test_every_point_of_a_grid_is_tried(tmp_path: Path) -> None:
    """Its first trials are counted, so they have to be its own."""
    sampler = "hydra/sweeper/sampler=grid"
    study(tmp_path, sampler, "beta=range(1,2)", "x=range(1,2)", "hydra.sweeper.n_trials=3")
    text = refused(tmp_path, sampler, "beta=range(1,2)", "x=range(1,3)")
    assert "the points of another grid (#2: {'beta': 2, 'x': 1})" in text
    assert "another grid (#0:" in refused(tmp_path, sampler, "beta=1", "x=range(1,2)")
    study(tmp_path, sampler, DRY, "beta=range(1,3)", "x=range(1,2)", "hydra.sweeper.n_trials=9")


def test_metrics_of_an_earlier_run_are_not_the_trials(tmp_path: Path) -> None:
    """They lie where it writes, and it fails before it writes any."""
    folder = tmp_path / "toy_x2.5_a_trial1"
    folder.mkdir()
    (folder / "progress.jsonl").write_text('{"step": 1, "eval/score": -100.0}\n')
    (tmp_path / "go").touch()
    median = ["hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1"]
    jobs = ["hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    study(tmp_path, X, "steps=1", "act=raise", "bad=1", first("x=3.0", "x=2.5"), *median, *jobs)
    good, bad = runs(tmp_path)
    assert (good["status"], bad["status"]) == ("completed", "failed")


def test_a_record_of_an_earlier_study(tmp_path: Path) -> None:
    """What the storage says counts; trials that it does not have are another study's."""
    name, own = "hydra.sweeper.study_name=old", "hydra.sweeper.study_name=new"
    study(tmp_path, X, ONE, name)
    study(tmp_path, X, ONE, own)
    [run] = runs(tmp_path)
    before = run["value"], run["overrides"]
    run |= {"value": 99.0, "overrides": ["x=9.0", *run["overrides"][1:]]}
    content = json.loads((tmp_path / "sweep.json").read_text()) | {"runs": [run]}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    study(tmp_path, X, ONE, own)
    assert [(run["value"], run["overrides"]) for run in runs(tmp_path)] == [before]
