"""python report.py: what it reads, ranks, writes, and what it says of what is not whole."""

import csv
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sweep_folders import Plan, grid, write_sweep

from specforge_exp.artifacts import contents
from specforge_exp.config import ReportConfig
from specforge_exp.errors import InputError
from specforge_exp.records import write_record
from specforge_exp.report.charts import charts
from specforge_exp.report.collect import collect
from specforge_exp.report.ranking import BEST, SAME, UNKNOWN, WORSE, headline, rank
from specforge_exp.report.table import columns, markdown
from specforge_exp.stages.report import at_end, make

ROOT = Path(__file__).resolve().parents[2]
DATA_SETS = ("stories", "arithmetic", "code")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_report_writes_four_files_and_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep(tmp_path, grid(bench=DATA_SETS))
    make(sweep, ReportConfig(resamples=300))
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].split("|")[2].strip() == "full-opd_lr3e-05"
    assert printed.rstrip().endswith(str(sweep / "report.html"))
    assert len((sweep / "report.md").read_text().split("```")[1].split("\n")) == 14
    found = rows(sweep / "report.csv")
    assert [row["rank"] for row in found] == [str(place) for place in range(1, 13)]
    assert found[0]["verdict"] == BEST and found[0]["command"].startswith("python train.py loss=")
    assert float(found[0]["low"]) < float(found[0]["value"]) < float(found[0]["high"])
    assert {"tau/code", "tau/code/low", "eval/alpha/6", "gpu_hours", "lr", "loss"} <= set(found[0])
    assert not list(sweep.glob("*.partial"))


def test_curves_csv_has_every_point(tmp_path: Path) -> None:
    plans = grid(("baseline",), points=700)
    sweep = write_sweep(tmp_path, plans)
    make(sweep, ReportConfig(resamples=10))
    found = rows(sweep / "curves.csv")
    lines = (tmp_path / plans[0].name / "metrics.jsonl").read_text().splitlines()
    expected = [
        (plans[0].name, str(line["step"]), key, str(value))
        for line in map(json.loads, lines)
        for key, value in line.items()
        if key != "step"
    ]
    ours = [tuple(row.values()) for row in found if row["run"] == plans[0].name]
    assert ours == expected
    loss = next(
        c for c in charts(collect(sweep), rank(collect(sweep), "loss", 10)) if c.key == "loss"
    )
    data = loss.figure.renderers[0].data_source.data
    assert len(data["training:x"][0]) == 200
    assert data["training:x"][0][0] == 10 and data["training:x"][0][-1] == 7000


def test_losses_are_minimised_and_lengths_are_not(tmp_path: Path) -> None:
    sweep = collect(write_sweep(tmp_path, grid(bench=DATA_SETS)))
    for metric, sign in (
        ("loss", 1),
        ("simulated_length", -1),
        ("alpha/0", -1),
        ("accepted_length", -1),
    ):
        found = rank(sweep, metric, 50)
        values = [sign * entry.value for entry in found.ranked if entry.value is not None]
        assert len(values) == 12 and values == sorted(values), metric
    assert {entry.verdict for entry in rank(sweep, "loss", 50).ranked[1:]} == {UNKNOWN}
    assert "nothing can be said" in " ".join(headline(rank(sweep, "loss", 50)))
    directed = write_sweep(
        tmp_path / "b", grid(), objectives=[{"name": "alpha/0", "direction": "minimize"}]
    )
    found = rank(collect(directed), "alpha/0", 50)
    assert found.ranked[0].runs[0].loss == "rkl-only"


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(12)))
def test_order_of_the_runs_does_not_change_the_ranking(order: list[int]) -> None:
    sweep = GRID()
    straight = rank(sweep, "simulated_length", 100)
    before = [(e.name, e.rank, e.verdict, e.interval) for e in straight.entries]
    sweep.runs[:] = [sweep.runs[place] for place in order]
    mixed = rank(sweep, "simulated_length", 100)
    assert [(e.name, e.rank, e.verdict, e.interval) for e in mixed.entries] == before


class Grid:
    """A grid that is read once."""

    def __init__(self) -> None:
        self.found: Any = None

    def __call__(self) -> Any:
        if self.found is None:
            from tempfile import mkdtemp

            folder = Path(mkdtemp())
            self.found = collect(write_sweep(folder, grid()))
            shutil.rmtree(folder)
        return self.found


GRID = Grid()


def test_close_runs_are_not_distinguishable_and_the_headline_says_so(tmp_path: Path) -> None:
    plans = [
        Plan("a_full", ["loss=full-opd"], {"loss": "full-opd", "lr": 1e-4, "seed": 0}, tau=3.400),
        Plan("a_base", ["loss=baseline"], {"loss": "baseline", "lr": 1e-4, "seed": 0}, tau=3.399),
        Plan("a_rkl", ["loss=rkl-only"], {"loss": "rkl-only", "lr": 1e-4, "seed": 0}, tau=2.9),
    ]
    found = rank(collect(write_sweep(tmp_path, plans)), "simulated_length", 1000)
    assert [entry.verdict for entry in found.ranked] == [BEST, SAME, WORSE]
    said = " ".join(headline(found))
    assert "full is best" in said and "Not distinguishable from it: base (1 of 2 others)" in said
    assert "Training noise is not in the intervals" in said


def test_one_seed_is_not_enough_where_intervals_overlap(tmp_path: Path) -> None:
    """Paired by conversation both differences are clear; the noise of training is known in one."""
    close = {"baseline": 3.32, "full-opd": 3.40}

    def verdicts(folder: Path, *seeds: int) -> list[str]:
        plans = [
            Plan(f"a_{loss}_{seed}", [f"loss={loss}"], {"loss": loss, "lr": 1e-4, "seed": seed},
                 tau=tau + 0.001 * seed)
            for (loss, tau), several in zip(close.items(), seeds, strict=True)
            for seed in range(several)
        ]  # fmt: skip
        found = rank(collect(write_sweep(folder, plans)), "simulated_length", 1000)
        last = found.ranked[-1]
        assert last.against and last.against.interval and last.against.interval[1] < 0
        return [entry.verdict for entry in found.ranked]

    assert verdicts(tmp_path / "one", 1, 1) == [BEST, SAME]
    assert verdicts(tmp_path / "other", 3, 1) == verdicts(tmp_path / "best", 1, 3) == [BEST, SAME]
    assert verdicts(tmp_path / "three", 3, 3) == [BEST, WORSE]


def test_runs_that_differ_in_seed_are_one_row_with_a_wider_interval(tmp_path: Path) -> None:
    sweep = collect(write_sweep(tmp_path, grid(seeds=3)))
    found, alone = rank(sweep, "simulated_length", 500), rank(sweep, "simulated_length", 500, True)
    assert len(found.entries) == 12 and len(alone.entries) == 36
    assert all(len(entry.finished) == 3 for entry in found.ranked)
    best = found.ranked[0]
    values = [run.metric("simulated_length") for run in best.runs]
    assert best.value == pytest.approx(sum(v for v in values if v is not None) / 3)
    assert best.mean("loss") == pytest.approx(sum(r.evaluation["loss"] for r in best.runs) / 3)
    assert best.label == "full-opd_lr3e-05"
    widths = [
        high - low for entry in (best, alone.ranked[0]) for low, high in [entry.interval or (0, 0)]
    ]
    assert widths[0] > widths[1]
    assert "include the spread between seeds" in " ".join(headline(found))
    keys = [column.key for column in columns(sweep, alone, True)]
    assert "seed" in keys and "verdict" not in keys
    assert "Every run:" in markdown(sweep, found, alone)


def test_paired_by_prompts_or_with_the_interval_that_old_files_have(tmp_path: Path) -> None:
    plans = grid(("baseline", "full-opd"), bench=DATA_SETS)
    sweep_dir = write_sweep(tmp_path, plans)
    found = rank(collect(sweep_dir), "accepted_length", 300)
    assert found.ranked[1].against and found.ranked[1].against.interval
    for plan in plans:
        file = tmp_path / plan.name / "bench.json"
        bench = json.loads(file.read_text())
        for one in bench["datasets"].values():
            del one["lengths"]
        file.write_text(json.dumps(bench))
    old = rank(collect(sweep_dir), "accepted_length", 300)
    assert [entry.name for entry in old.ranked] == [entry.name for entry in found.ranked]
    last = old.ranked[-1]
    assert last.interval and last.against and last.against.interval is None
    assert last.against.distinguishable is not None


@pytest.mark.parametrize("copied", [False, True])
def test_the_newest_bench_counts_and_other_prompts_are_not_paired(
    tmp_path: Path, copied: bool
) -> None:
    """A copy's files may be written in any order; they say when they were measured."""
    plans = grid(("baseline", "full-opd"), bench=DATA_SETS)
    sweep_dir = write_sweep(tmp_path, plans)
    first = tmp_path / plans[0].name / "bench.json"
    bench = json.loads(first.read_text())
    for one in bench["datasets"].values():
        one |= {"source": "shipped", "lengths": [length + 2 for length in one["lengths"]]}
    newer = first.with_name("bench-standard.json")
    later = first.stat().st_mtime + (-5 if copied else 5)
    if copied:
        told = {"finished": "2026-11-30T23:59:59+00:00"}
        first.write_text(json.dumps(json.loads(first.read_text()) | told))
        bench["finished"] = "2026-12-01T00:00:00+00:00"
    newer.write_text(json.dumps(bench))
    os.utime(newer, (later, later))
    found = rank(collect(sweep_dir), "accepted_length", 300)
    assert found.ranked[0].name == plans[0].name and found.ranked[0].value > 4
    assert found.ranked[1].against is not None and found.ranked[1].against.interval is None


def test_a_running_sweep_has_a_report(tmp_path: Path) -> None:
    plans = grid(points=30)
    for place, status in ((3, "running"), (4, "planned"), (5, "planned")):
        plans[place].status = status
    sweep_dir = write_sweep(tmp_path, plans, state="running")
    cut = tmp_path / plans[3].name / "metrics.jsonl"
    cut.write_bytes(cut.read_bytes()[:-40])
    make(sweep_dir, ReportConfig(resamples=50))
    found = collect(sweep_dir)
    assert not found.problems
    running = found.runs[3]
    assert not running.final and running.step and len(running.curves["loss"].steps) == 30
    ranking = rank(found, "simulated_length", 50)
    assert len(ranking.ranked) == 9 and [e.rank for e in ranking.entries[9:]] == [None] * 3
    assert "running at step" in (sweep_dir / "report.md").read_text()


def test_a_killed_run_has_curves_beyond_its_checkpoint(tmp_path: Path) -> None:
    """Its newest checkpoint knows the metrics of then, which are not what it has logged since."""
    sweep_dir = write_sweep(tmp_path, [replace(grid(("baseline",))[0], status="failed")])
    folder = next(path for path in tmp_path.iterdir() if path.name != "sweeps")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for step, kept in (("000100", 12), ("000200", 23)):
        (folder / f"step-{step}").mkdir()
        (folder / f"step-{step}" / "metrics.jsonl").write_text("".join(lines[:kept]))
        files = contents(folder / f"step-{step}", ["metrics.jsonl"])
        state = {"step": int(step), "settings": {}, "inputs": {}, "files": files}
        write_record(folder / f"step-{step}" / "state.json", state)
    found = collect(sweep_dir)
    assert found.problems == [] and len(found.runs[0].curves["loss"].steps) == 45


def test_nothing_has_finished_yet(tmp_path: Path) -> None:
    plans = grid(("baseline",))
    for plan in plans:
        plan.status = "planned"
    sweep_dir = write_sweep(tmp_path, plans, state="running")
    make(sweep_dir, ReportConfig(metric="accepted_length"))
    assert "No run has finished" in (sweep_dir / "report.md").read_text()
    (sweep_dir / "sweep.json").write_text(json.dumps({"version": 1, "runs": []}))
    make(sweep_dir, ReportConfig())


@pytest.mark.parametrize(
    "content", [b"\x00\xff{", b"[]\n", b'{"step": "x"}\n{}\n', b'{"a": 1}\n', b""]
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four runs, in each of which another file is damaged; the other two are whole."""
    plans = grid(("baseline", "full-opd"), bench=DATA_SETS)
    sweep_dir = write_sweep(tmp_path, plans)
    silent = [  # as if being written, nothing yet, a record without an evaluation
        ("metrics.jsonl", b"\x00\xff{"), ("metrics.jsonl", b""), ("run.json", b'{"a": 1}\n'),
    ]  # fmt: skip
    expected = []
    names = ["metrics.jsonl", "run.json", "evaluation.json", "bench.json"]
    for plan, name in zip(plans[1:5], names, strict=True):
        file = tmp_path / plan.name / name
        file.write_bytes(content)
        expected += [] if (name, content) in silent else [str(file)]
    make(sweep_dir, ReportConfig(resamples=20))
    found = collect(sweep_dir)
    assert len(found.problems) == len(expected)
    assert all(any(file in problem for problem in found.problems) for file in expected)
    assert "Traceback" not in capsys.readouterr().out
    assert len(rows(sweep_dir / "report.csv")) == 6


def test_a_damaged_line_in_the_middle_leaves_the_curves_out(tmp_path: Path) -> None:
    plans = grid(("baseline",))
    sweep_dir = write_sweep(tmp_path, plans)
    file = tmp_path / plans[0].name / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], lines[5][:30], *lines[6:]]) + "\n")
    found = collect(sweep_dir)
    assert len(found.problems) == 1 and f"{file} is damaged" in found.problems[0]
    assert "line 6" in found.problems[0]
    assert not found.runs[0].curves and found.runs[0].metric("simulated_length")
    make(sweep_dir, ReportConfig(resamples=20))
    assert plans[0].name not in {row["run"] for row in rows(sweep_dir / "curves.csv")}


def test_a_damaged_entry_of_sweep_json_is_named(tmp_path: Path) -> None:
    sweep_dir = write_sweep(tmp_path, grid(("baseline", "full-opd")))
    file = sweep_dir / "sweep.json"
    runs = json.loads(file.read_text())["runs"]
    runs[0]["record"], runs[1]["number"], runs[2] = ["x"], "one", None
    change(file, runs=runs, objectives=["simulated_length"])
    make(sweep_dir, ReportConfig(resamples=10))
    found = collect(sweep_dir)
    assert len(found.problems) == 3 and len(found.runs) == 3


def test_numbers_that_are_none_are_no_points(tmp_path: Path) -> None:
    plans = grid(("baseline",))
    sweep_dir = write_sweep(tmp_path, plans)
    file = tmp_path / plans[0].name / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": 2.5}\n'
    )
    found = collect(sweep_dir)
    assert not found.problems and found.runs[0].curves["loss"].values.tolist() == [2.5]


def test_an_evaluation_of_another_run_is_not_used(tmp_path: Path) -> None:
    plans = grid(("baseline",))
    sweep_dir = write_sweep(tmp_path, plans)
    change(tmp_path / plans[0].name / "evaluation.json", length=[9.0], slots=[1])
    found = collect(sweep_dir)
    assert "evaluation.json" in found.problems[0] and not found.runs[0].samples


def test_sweeps_of_another_script(tmp_path: Path) -> None:
    plans = grid(("baseline",), bench=("stories",))
    bench = write_sweep(tmp_path, plans, script="bench", objectives=[{"name": "value"}])
    make(bench, ReportConfig(metric="accepted_length", resamples=50))
    assert "python bench.py loss=baseline" in (bench / "report.md").read_text()
    change(bench / "sweep.json", runs=[  # as `bench.py -m run=a,b` leaves it
        run | {"overrides": ["run=other"]}
        for run in json.loads((bench / "sweep.json").read_text())["runs"]
    ])  # fmt: skip
    make(bench, ReportConfig(metric="accepted_length", resamples=50))
    names = {row["run"] for row in rows(bench / "report.csv")}
    assert names == {plan.name for plan in plans}
    prep = [Plan(f"p{n}", [f"data.seed={n}"], {}, points=0) for n in range(3)]
    make(write_sweep(tmp_path, prep, script="prep", objectives=[]), ReportConfig())


def test_a_metric_that_no_run_has(tmp_path: Path) -> None:
    sweep = collect(write_sweep(tmp_path, grid()))
    with pytest.raises(
        InputError, match=r"simulated_lenght is in no evaluation .* simulated_length"
    ):
        rank(sweep, "simulated_lenght", 10)
    with pytest.raises(InputError, match=r"python bench\.py sweep="):
        rank(sweep, "accepted_length", 10)


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    record = {"loss": evil, "lr": 1e-4, "seed": 0}
    plans = [Plan(f"run{n}", [f"loss={evil}"], record, error=evil) for n in range(2)]
    sweep_dir = write_sweep(tmp_path, plans)
    make(sweep_dir, ReportConfig(resamples=10))
    assert "<script>alert" not in (sweep_dir / "report.html").read_text()


def test_at_end_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_dir = write_sweep(tmp_path, grid(("baseline",)))
    at_end(OmegaConf.create({"report": {"metric": "loss", "resamples": 20}}), str(sweep_dir))
    assert "held-out loss" in capsys.readouterr().out
    assert (sweep_dir / "report.html").is_file()
    (sweep_dir / "report.html").unlink()
    (sweep_dir / "report.html").mkdir()  # what the page cannot take the place of
    with pytest.raises(InputError, match=f"report.py sweep={sweep_dir} makes it later"):
        at_end(OmegaConf.create({"report": {"resamples": 20}}), sweep_dir)


def script(*options: str) -> subprocess.CompletedProcess[str]:
    return warm.run(["report.py", "experiment=quickstart", *options], cwd=ROOT)


def test_script(tmp_path: Path) -> None:
    sweep_dir = write_sweep(tmp_path, grid(("baseline", "full-opd")))
    options = [f"paths.checkpoints={tmp_path}", "report.resamples=50"]
    done = script(f"sweep={sweep_dir}", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| #") and str(sweep_dir / "report.html") in done.stdout
    missing = script("sweep=no/such", *options)
    assert missing.returncode == 1 and "Traceback" not in missing.stderr
    assert str(sweep_dir) in missing.stderr
    unsaid = script(*options)
    assert unsaid.returncode == 1 and "sweep=<dir> is missing" in unsaid.stderr
