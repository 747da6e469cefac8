"""report.py run=: runs that are named themselves, one or several on a page."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from sweep_folders import grid, write_sweep

from specforge_exp.config import ReportConfig
from specforge_exp.errors import InputError
from specforge_exp.report import single
from specforge_exp.report.collect import collect
from specforge_exp.report.single import (
    collect_runs,
    distribution_chart,
    distribution_table,
    shares,
    tau,
)
from specforge_exp.stages.report import write

DATA_SETS = ("stories", "arithmetic")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Twelve runs with measurements; of the first two a histogram, as bench writes it."""
    write_sweep(tmp_path, grid(bench=DATA_SETS))
    for number, folder in enumerate(sorted(path.parent for path in tmp_path.glob("*/bench.json"))):
        bench = json.loads((folder / "bench.json").read_text())
        for figures in bench["datasets"].values():
            figures["gained"] = [10, 6, 3, 1] if number else [5, 5, 5, 5]
        (folder / "bench.json").write_text(json.dumps(bench))
    return tmp_path


def names(checkpoints: Path) -> list[str]:
    return sorted(path.parent.name for path in checkpoints.glob("*/bench.json"))


def test_one_run_has_a_page_of_its_own(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = names(checkpoints)[0]
    write(collect_runs([name], str(checkpoints)), ReportConfig(resamples=50))
    page = (checkpoints / name / "report.html").read_text()
    assert "Curves" in page and "Tokens gained by a verification" in page
    assert "| at least 3 | 50.0 % |" in capsys.readouterr().out
    assert (checkpoints / name / "curves.csv").stat().st_size


def test_two_runs_side_by_side(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = names(checkpoints)[:2]
    both = collect_runs([first, str(checkpoints / second)], str(checkpoints))
    assert [len(run.curves) > 0 for run in both.runs] == [True, True]
    assert [round(tau(run), 3) for run in both.runs] == [2.5, 1.75]
    write(both, ReportConfig(resamples=50))
    printed = capsys.readouterr().out
    assert "| 1 | 25.0 % | 50.0 % |" in printed and "| at least 5 | 0.0 % | 0.0 % |" in printed
    folder = checkpoints / "sweeps" / "compared" / f"{first}--{second}"
    assert distribution_table(both.runs) in (folder / "report.md").read_text()


def test_runs_of_one_name_stay_apart(checkpoints: Path, tmp_path: Path) -> None:
    """In two folders of checkpoints, and one of them asked for twice."""
    first, second = names(checkpoints)[:2]
    shutil.copytree(checkpoints / second, tmp_path / "other" / first)
    asked = [first, str(tmp_path / "other" / first), str(checkpoints / first)]
    both = collect_runs(asked, str(checkpoints))
    assert [run.folder for run in both.runs] == [checkpoints / first, tmp_path / "other" / first]
    write(both, ReportConfig(metric="loss", resamples=50))
    with (both.folder / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["run"] for row in rows}) == 2
    assert all(row["group_value"] == row["value"] for row in rows)


def test_a_distribution_of_some_data_sets_is_none_of_all(checkpoints: Path) -> None:
    """A server that did not say which verification an answer ended in: bench has no histogram."""
    first = names(checkpoints)[0]
    bench = json.loads((checkpoints / first / "bench.json").read_text())
    bench["datasets"][DATA_SETS[0]]["gained"] = []
    (checkpoints / first / "bench.json").write_text(json.dumps(bench))
    [run] = collect_runs([first], str(checkpoints)).runs
    assert shares(run) == []


def test_the_chart_has_the_figures_of_the_table(checkpoints: Path) -> None:
    [run] = collect_runs(names(checkpoints)[:1], str(checkpoints)).runs
    chart = distribution_chart([run])
    assert chart is not None
    data = chart.figure.renderers[0].data_source.data
    told = {key: values[0] for key, values in data.items()}
    assert told == {"run": run.label, "xs": [1, 2, 3, 4], "ys": [0.25] * 4,
                    "three": 0.5, "five": 0.0}  # fmt: skip


def test_distributions_of_other_lengths_and_of_too_many_runs(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data sets of one run count up to their own longest; of many runs the best are drawn."""
    first, second = names(checkpoints)[:2]
    bench = json.loads((checkpoints / first / "bench.json").read_text())
    bench["datasets"][DATA_SETS[0]]["gained"] = [5, 5]
    (checkpoints / first / "bench.json").write_text(json.dumps(bench))
    runs = collect_runs([second, first], str(checkpoints)).runs
    assert shares(runs[1]) == pytest.approx([10 / 30, 10 / 30, 5 / 30, 5 / 30])
    monkeypatch.setattr(single, "MOST", 1)
    chart = distribution_chart(runs)
    assert chart is not None and tau(runs[1]) > tau(runs[0])
    assert chart.figure.renderers[0].data_source.data["run"] == [runs[1].label]


def test_a_folder_that_holds_no_run_is_none(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's own path comes before a name below the checkpoints."""
    first, second = names(checkpoints)[:2]
    (checkpoints / "empty").mkdir()
    with pytest.raises(InputError, match="run=empty is no folder of a run"):
        collect_runs(["empty"], str(checkpoints))
    shutil.copytree(checkpoints / second, checkpoints / "here" / first)
    monkeypatch.chdir(checkpoints / "here")
    assert [run.folder for run in collect_runs([first], str(checkpoints)).runs] == [Path(first)]


def test_what_runs_say_of_themselves(checkpoints: Path) -> None:
    """When they ended and what made them; of one that has not ended, that it goes on."""
    first, second, third = names(checkpoints)[:3]
    for name, finished in ((first, "2026-11-02"), (second, "2026-11-01")):
        file = checkpoints / name / "run.json"
        told = {"finished": finished, "command": f"train.py run_name={name}"}
        file.write_text(json.dumps(json.loads(file.read_text()) | told))
    both = collect_runs([first, second], str(checkpoints))
    assert (both.started, both.updated, both.state) == ("2026-11-01", "2026-11-02", "complete")
    assert [run.command for run in both.runs] == [f"train.py run_name={n}" for n in (first, second)]
    (checkpoints / third / "run.json").unlink()
    going = collect_runs([first, third], str(checkpoints))
    assert [run.status for run in going.runs] == ["completed", "running"]
    assert going.state == "running"


def test_a_sweep_shows_the_distributions_of_its_runs(checkpoints: Path) -> None:
    [sweep] = [path.parent for path in checkpoints.rglob("sweep.json")]
    assert sum(bool(shares(run)) for run in collect(sweep).runs) == 12


def test_a_run_that_is_not_there_is_named_with_those_that_are(checkpoints: Path) -> None:
    there = names(checkpoints)[0]
    with pytest.raises(InputError, match=f"run=nope is no folder of a run.*{there}"):
        collect_runs(["nope"], str(checkpoints))
