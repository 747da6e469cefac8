"""A number belongs to the run it is shown for: whose a folder is, and whose a measurement."""

import csv
import json
import shutil
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import conftest
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sweep_folders import Plan, units, write_run, write_sweep
from test_report import change

from specforge_exp.artifacts import contents, sha256
from specforge_exp.config import ReportConfig, from_omegaconf
from specforge_exp.config.settings import training_settings
from specforge_exp.records import write_record
from specforge_exp.report.collect import collect
from specforge_exp.report.origin import run_folder
from specforge_exp.report.record import read_sweep
from specforge_exp.stages.report import make

RUN = "quickstart_full-opd"
TOKENS = "quickstart--tiny.tokens"
JOB = ["experiment=quickstart", "loss=full-opd", "max_steps=2"]


@cache
def composed(*overrides: str) -> Any:
    """To be read only."""
    return conftest.composed(*overrides)


def sweep_of(folder: Path, value: float | None, status: str = "completed", **top: Any) -> Path:
    """A sweep of one job, which has left no more than its line."""
    plan = Plan(RUN, JOB, {"loss": "full-opd", "lr": 8e-3}, status=status, value=value, points=0)
    return write_sweep(folder / "checkpoints", [plan], **top)


def keep_options(sweep_dir: Path, *overrides: str) -> None:
    """What Hydra keeps in the folder of a job."""
    kept = sweep_dir / RUN / ".hydra" / "train"
    kept.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(list(overrides)), kept / "overrides.yaml")
    OmegaConf.save(composed(*overrides), kept / "config.yaml")


def trained(folder: Path, tau: float, *overrides: str) -> Path:
    """A finished training with this result; with overrides, its record has their settings."""
    write_run(folder, Plan(RUN, [], {"loss": "full-opd", "lr": 8e-3}, tau), units(), 1)
    if overrides:
        options = training_settings(from_omegaconf(composed(*overrides)))
        change(folder / "run.json", settings=options, inputs={TOKENS: "0"})
    return folder


def shown(sweep_dir: Path) -> dict[str, str]:
    """The run's line of report.csv."""
    make(sweep_dir, ReportConfig(resamples=20))
    with (sweep_dir / "report.csv").open() as file:
        [row] = csv.DictReader(file)
    return row


def test_a_job_elsewhere_and_a_finished_run_here_of_one_name(tmp_path: Path) -> None:
    """The run here never speaks for the job: before the job has left anything, with the files that
    come back with it, and with the rest pulled."""
    sweep_dir = sweep_of(tmp_path, value=1.0186)
    (sweep_dir / "modal").mkdir()
    here = trained(tmp_path / "checkpoints" / RUN, 4.186, "experiment=quickstart", "loss=full-opd")
    row = shown(sweep_dir)
    assert row["value"] == "1.0186" and not row["folder"] and not row["low"]
    assert f"{here} is not of this run: its simulated_length is 4.186" in row["not_known"]
    for file in ("report.md", "report.html"):
        assert "4.186, the job returned 1.0186" in (sweep_dir / file).read_text()

    keep_options(sweep_dir, *JOB)
    assert "max_steps=None, the job with 2" in shown(sweep_dir)["not_known"]
    own = sweep_dir / RUN
    small = trained(tmp_path / "there", 1.0186, *JOB)
    for name in ("run.json", "evaluation.json", "metrics.jsonl"):
        shutil.copy(small / name, own / name)
    row = shown(sweep_dir)
    assert row["folder"] == str(own) and float(row["low"]) < 1.0186 < float(row["high"])
    assert not row["not_known"]

    (small / "step-000002").mkdir()
    pulled = sweep_dir / "modal" / "0-abc" / "checkpoints" / RUN
    shutil.copytree(small, pulled)
    assert shown(sweep_dir)["folder"] == str(pulled)


@pytest.mark.parametrize("status", ["planned", "running", "failed"])
def test_a_job_without_a_value_is_known_by_its_options(tmp_path: Path, status: str) -> None:
    sweep_dir = sweep_of(tmp_path, None, status)
    here = trained(tmp_path / "checkpoints" / RUN, 4.186, "experiment=quickstart", "loss=full-opd")
    keep_options(sweep_dir, *JOB)
    row = shown(sweep_dir)
    assert not row["value"] and "max_steps=None, the job with 2" in row["not_known"]
    (here / "run.json").unlink()  # interrupted: a checkpoint says what it was made of
    (here / "step-000002").mkdir()
    state = {"settings": training_settings(from_omegaconf(composed(*JOB))), "inputs": {TOKENS: "0"}}
    (here / "step-000002" / "state.json").write_text(json.dumps(state))
    assert shown(sweep_dir)["folder"] == str(here)


def test_other_tokens_and_options_of_another_command(tmp_path: Path) -> None:
    sweep_dir = sweep_of(tmp_path, None, "running")
    here = trained(tmp_path / "checkpoints" / RUN, 1.02, *JOB)
    keep_options(sweep_dir, *JOB)
    assert shown(sweep_dir)["folder"] == str(here)
    change(here / "run.json", inputs={"other--tiny.tokens": "0"})
    assert (
        "tokens=other--tiny.tokens, the job with quickstart--tiny" in shown(sweep_dir)["not_known"]
    )
    runs = json.loads((sweep_dir / "sweep.json").read_text())["runs"]
    runs[0]["overrides"] = [*JOB[:2], "max_steps=3"]
    change(sweep_dir / "sweep.json", runs=runs)
    assert "nothing in it says" in shown(sweep_dir)["not_known"]


def test_a_job_that_ran_here(tmp_path: Path) -> None:
    """The sweeper leaves a folder of logs under the run's name in the sweep."""
    sweep_dir = sweep_of(tmp_path, 4.186)
    (sweep_dir / RUN).mkdir()
    (sweep_dir / RUN / "train.log").write_text("")
    sweep = read_sweep(sweep_dir)
    assert run_folder(sweep_dir, sweep, sweep["runs"][0]) == (None, [])
    here = trained(tmp_path / "checkpoints" / RUN, 4.186)
    assert run_folder(sweep_dir, sweep | {"cwd": "/nowhere"}, sweep["runs"][0]) == (here, [])
    (here / "run.json").unlink()  # trained again, not far yet
    (here / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    row = shown(sweep_dir)
    assert row["value"] == "4.186" and "simulated_length is None" in row["not_known"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["", "own", "other"]), min_size=3, max_size=3), st.booleans())
def test_a_shown_number_is_the_returned_one(places: list[str], away: bool) -> None:
    """Whatever lies where, under the name of a run that returned 3.5."""
    with TemporaryDirectory() as name:
        root = Path(name)
        sweep_dir = sweep_of(root, value=3.5)
        if away:
            (sweep_dir / "modal").mkdir()
        folders = (sweep_dir / RUN, sweep_dir / "modal/0-a/checkpoints" / RUN,
                   root / "checkpoints" / RUN)  # fmt: skip
        for folder, content in zip(folders, places, strict=True):
            if content:
                trained(folder, 3.5 if content == "own" else 4.5)
        [run] = collect(sweep_dir).runs
        assert run.metric("simulated_length") == 3.5
        first = next(
            (f for f, content in zip(folders, places, strict=True) if content == "own"), None
        )
        assert run.folder == first
        assert len(run.not_known) == (0 if first else sum(map(bool, places)))


def test_curves_of_another_attempt_are_left_out(tmp_path: Path) -> None:
    sweep_dir = sweep_of(tmp_path, 4.186)
    here = trained(tmp_path / "checkpoints" / RUN, 4.186)
    shutil.copy(trained(tmp_path / "other", 2.0) / "metrics.jsonl", here / "metrics.jsonl")
    row = shown(sweep_dir)
    assert row["value"] == "4.186" and "metrics.jsonl: it ends with a loss" in row["not_known"]
    assert not row["seconds"] and len((sweep_dir / "curves.csv").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_measurement_of_another_draft_is_left_out(tmp_path: Path) -> None:
    """bench.json names the export beside it, and a draft of the checkpoints that are there."""
    sweep_dir = sweep_of(tmp_path, 4.186)
    here = tmp_path / "checkpoints" / RUN
    plan = Plan(RUN, [], {"loss": "full-opd", "lr": 8e-3}, 4.186, bench=("stories",))
    write_run(here, plan, units(), 1)
    (here / "step-000002").mkdir()
    (here / "export").mkdir()
    record = here / "export" / "run.json"
    for export, draft, measured in product(("same", "other"), ("same", "other"), ("a", None)):
        record.write_text(json.dumps({"export": export}))
        inputs = {"the export": sha256(record), "the draft": measured}
        change(here / "bench.json", inputs={k: v for k, v in inputs.items() if v})
        record.write_text(json.dumps({"export": "same"}))
        state = {"draft": "a" if draft == "same" else "b", "inputs": {}}
        (here / "step-000002" / "state.json").write_text(json.dumps(state))
        row, own = shown(sweep_dir), (export, draft, measured) == ("same", "same", "a")
        assert ("tau/stories" in row) == own, (export, draft, measured)
        assert ("it measured a" in row["not_known"]) != own


@pytest.mark.parametrize("name", ["run.json", "bench.json", "evaluation.json", "metrics.jsonl"])
def test_a_record_that_was_changed_is_left_out(tmp_path: Path, name: str) -> None:
    """Records are compared with their own digest, the rest with what run.json says was written."""
    sweep_dir = sweep_of(tmp_path, 4.186)
    here = tmp_path / "checkpoints" / RUN
    write_run(here, Plan(RUN, [], {"loss": "a"}, 4.186, bench=("stories",)), units(), 1)
    record = json.loads((here / "run.json").read_text())
    record |= {"files": contents(here, ["evaluation.json", "metrics.jsonl"]), "processes": 1}
    write_record(here / "run.json", record)
    bench = json.loads((here / "bench.json").read_text())
    write_record(here / "bench.json", bench)
    row = shown(sweep_dir)
    assert not row["not_known"] and row["tau/stories"]
    old, new = {
        "run.json": ('"processes": 1', '"processes": 8'),
        "bench.json": ('"target": "tiny"', '"target": "huge"'),
        "evaluation.json": ('"step": ', '"step":  '),
        "metrics.jsonl": ('"epoch": 0', '"epoch": 1'),
    }[name]
    text = (here / name).read_text()
    (here / name).write_text(text.replace(old, new, 1))
    assert (here / name).read_text() != text
    row = shown(sweep_dir)
    if name == "run.json":  # nothing else says what is in the folder
        assert f"{here / name} cannot be read (it was changed" in row["not_known"]
    else:
        assert f"{here / name} is " in row["not_known"] and "left out" in row["not_known"]
    assert bool(row.get("tau/stories")) == (name not in ("bench.json", "run.json"))
    assert bool(row["low"]) == (name not in ("evaluation.json", "run.json"))


def test_a_measurement_beside_a_damaged_checkpoint_is_left_out(tmp_path: Path) -> None:
    """What it measured cannot be compared."""
    sweep_dir = sweep_of(tmp_path, 4.186)
    here = tmp_path / "checkpoints" / RUN
    write_run(here, Plan(RUN, [], {"loss": "a"}, 4.186, bench=("stories",)), units(), 1)
    (here / "step-000002").mkdir()
    (here / "step-000002" / "state.json").write_text("{")
    row = shown(sweep_dir)
    assert "state.json cannot be read" in row["not_known"] and not row.get("tau/stories")
