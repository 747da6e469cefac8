"""What the report collects of runs: where they lie, what they cost, what they are called."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweep_folders import grid, write_sweep
from test_published import RESULT
from test_report import change

from specforge_exp.causal.objective import intervals, means
from specforge_exp.config import ReportConfig
from specforge_exp.losses import TERMS
from specforge_exp.report.charts import charts
from specforge_exp.report.collect import collect, labels
from specforge_exp.report.ranking import rank
from specforge_exp.report.record import directions, returned_values
from specforge_exp.report.table import columns, varied, write_csv
from specforge_exp.report.text import measure
from specforge_exp.stages.report import make


def test_a_sweep_that_moved_and_one_from_modal(tmp_path: Path) -> None:
    plans = grid(("baseline",))
    for plan in plans:
        plan.value = plan.tau
    sweep_dir = write_sweep(tmp_path / "here", plans)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = tmp_path / "there" / sweep_dir.relative_to(tmp_path / "here")
    change(moved / "sweep.json", cwd="/nowhere")
    assert all(run.folder for run in collect(moved).runs)
    pulled = moved / "modal" / "0-abc" / "checkpoints" / plans[0].name
    pulled.parent.mkdir(parents=True)
    shutil.move(tmp_path / "there" / plans[0].name, pulled)
    shutil.move(tmp_path / "there" / plans[1].name, moved / plans[1].name)
    runs = collect(moved).runs
    assert runs[0].folder == pulled and runs[1].folder == moved / plans[1].name
    assert all(run.curves and run.metric("simulated_length") for run in runs)


def test_gpu_hours_and_cost(tmp_path: Path) -> None:
    plans = grid(("baseline",))
    for plan in plans:
        plan.record |= {"usd_per_hour": 31.6}
    sweep_dir = write_sweep(tmp_path, plans)
    change(tmp_path / plans[0].name / "run.json", config={"trainer": {"gpus": 8}})
    run = collect(sweep_dir).runs[0]
    assert run.gpu_hours == pytest.approx(8 * 45 * 2.7 / 3600)
    change(tmp_path / plans[0].name / "run.json", workers=4)  # the target's
    assert collect(sweep_dir).runs[0].gpu_hours == pytest.approx(12 * 45 * 2.7 / 3600)
    assert run.usd == pytest.approx(45 * 2.7 / 3600 * 31.6)
    make(sweep_dir, ReportConfig(resamples=10))
    assert "USD" in (sweep_dir / "report.md").read_text()


def test_hours_of_a_run_are_the_mean_of_those_that_are_known(tmp_path: Path) -> None:
    """One of two seeds has lost its metrics: it took no time that anybody knows, not none."""
    plans = grid(("baseline",), seeds=2)
    sweep_dir = write_sweep(tmp_path, plans)
    for plan in plans[:2]:
        change(tmp_path / plan.name / "run.json", processes=8)
    (tmp_path / plans[1].name / "metrics.jsonl").unlink()
    sweep = collect(sweep_dir)
    [cost] = [c for c in charts(sweep, rank(sweep, "simulated_length", 10)) if c.key == "cost"]
    hours = cost.figure.renderers[0].data_source.data["hours"]
    assert sorted(hours) == pytest.approx([45 * 2.7 / 3600 * gpus for gpus in (1, 1, 8)])


def test_a_row_of_the_csv_is_its_run_s_and_its_configuration_s(tmp_path: Path) -> None:
    plans = grid(("baseline", "full-opd"), seeds=2, bench=("stories", "code"))
    for plan in plans:
        plan.record |= {"usd_per_hour": 10.0, "gpus": 2}
    sweep = collect(write_sweep(tmp_path, plans))
    both = [rank(sweep, "simulated_length", 50, by_seed) for by_seed in (False, True)]
    write_csv(tmp_path / "report.csv", *both)
    with (tmp_path / "report.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert len(rows) == 12
    for group in both[0].entries:
        for run in group.runs:
            own = next(entry for entry in both[1].entries if entry.runs == [run])
            assert own.interval and group.interval and group.against and group.against.interval
            code = run.datasets["code"]
            assert code.interval
            told = {
                "rank": own.rank, "number": run.number, "status": "completed", "step": 450,
                "lr": run.choices["lr"], "seed": run.choices["seed"], "metric": "simulated_length",
                "value": own.value, "low": own.interval[0], "high": own.interval[1],
                "group": group.label, "group_rank": group.rank, "group_seeds": 2,
                "group_value": group.value, "group_low": group.interval[0],
                "group_high": group.interval[1], "difference": group.against.value,
                "difference_low": group.against.interval[0], "verdict": group.verdict,
                "difference_high": group.against.interval[1], "tau/code": code.value,
                "tau/code/low": code.interval[0], "tau/code/high": code.interval[1],
                "eval/loss": run.evaluation["loss"], "gpu_hours": run.gpu_hours, "usd": run.usd,
                "seconds": run.seconds, "folder": run.folder, "command": run.command,
            }  # fmt: skip
            assert {key: rows[run.name][key] for key in told} == {
                k: str(v) for k, v in told.items()
            }


def test_columns_are_what_runs_differ_in(tmp_path: Path) -> None:
    """Also in what one of them alone was given; of several seeds the costs are of all."""
    plans = grid(("baseline",), seeds=2)
    plans[5].overrides.append("trainer.clip=2")
    plans[4].overrides.append("trainer.clip=2")
    sweep = collect(write_sweep(tmp_path, plans))
    assert varied(sweep) == ["loss", "lr", "trainer.clip"]
    ranking = rank(sweep, "simulated_length", 50)
    told = {column.key: column for column in columns(sweep, ranking, False)}
    best, other = ranking.ranked[:2]
    assert told["seeds"].text(best) == "2 of 2"
    assert told["gpu_hours"].value(best) == pytest.approx(2 * 45 * 2.7 / 3600)
    assert told["eval/loss"].text(best) == measure(best.mean("loss"))
    against = told["against"]
    assert against.between is not None and other.against is not None
    assert (against.text(best), against.between(best)) == ("", "")
    assert against.text(other) == f"{other.against.value:+.3f}" and other.against.value < 0
    assert "eval/simulated_length" not in told


def test_values_that_runs_return() -> None:
    """By objective, in their order; what is no finite number is not known, 0 is."""
    sweep = {"objectives": [{"name": "a"}, {"name": "b", "direction": "minimize"}, "c"]}
    assert directions(sweep) == {"a": "maximize", "b": "minimize"}
    for value, known in (
        (2, {"a": 2.0}), ([1, 3.5], {"a": 1.0, "b": 3.5}), ([0.0, None], {"a": 0.0}),
        ([True, float("nan")], {}), (None, {}),
    ):  # fmt: skip
        assert returned_values(sweep, {"value": value}) == known


def test_less_is_better_of_every_loss(tmp_path: Path) -> None:
    """Of all terms of drafts' losses, and of what a causal model reports."""
    sweep = collect(write_sweep(tmp_path, grid(("baseline",)), objectives=[]))
    terms = [name for name, _ in TERMS.values()]
    causal = set(means({"rows": torch.ones(1), "nll": torch.ones(1), "top1": torch.ones(1)}))
    causal |= set(intervals([[1.0, 1.0], [2.0, 1.0]]))
    for name in ("loss", "kl", *terms, *causal - {"top1", "supervised"}, "gpu_hours"):
        assert sweep.minimised(name) and sweep.minimised(f"{name}/0"), name
    for name in ("simulated_length", "accepted_length", "alpha", "top1", "tokens_per_s"):
        assert not sweep.minimised(name) and not sweep.minimised(f"{name}/0"), name


def test_published_figures_stand_beside_the_same_setting_only(tmp_path: Path) -> None:
    plans = grid(("baseline",))
    sweep_dir = write_sweep(tmp_path, plans)
    for plan in plans:
        (tmp_path / plan.name / "bench.json").write_text(json.dumps(RESULT | {"average": 6.1}))
    sampled = {"settings": {**RESULT["settings"], "temperature": 0.5}}
    change(tmp_path / plans[0].name / "bench.json", **sampled)
    runs = collect(sweep_dir).runs
    assert [len(run.published) for run in runs[:2]] == [0, 1]
    make(sweep_dir, ReportConfig(resamples=10))
    html = (sweep_dir / "report.html").read_text()
    assert "Published figures of the same setting" in html
    assert html.count("z-lab DFlash") == 2 * (len(runs) - 1)  # as sort key and as text
    for run in runs:
        (tmp_path / run.name / "bench.json").unlink()
    make(sweep_dir, ReportConfig(resamples=10))
    assert "Published figures" not in (sweep_dir / "report.html").read_text()


def test_links_to_wandb(tmp_path: Path) -> None:
    plans = grid(("baseline",))
    sweep_dir = write_sweep(tmp_path, plans)
    url, sync = "https://wandb.ai/us/drafts/runs/abc", "wandb sync /there/offline-run-1"
    said = [{"url": url, "sync": sync}, {"url": None, "sync": sync}, {"url": "javascript:alert(1)"}]
    for plan, told in zip(plans, said, strict=True):
        (tmp_path / plan.name / "tracker.json").write_text(json.dumps(told))
    assert [run.tracker for run in collect(sweep_dir).runs] == [{"url": url}, {"sync": sync}, {}]
    make(sweep_dir, ReportConfig(resamples=10))
    html = (sweep_dir / "report.html").read_text()
    assert f'<a href="{url}"' in html and f'data-copy="{sync}"' in html
    assert "javascript:alert" not in html


@given(
    st.lists(
        st.from_regex(r"[a-z_0-9.-]{1,12}", fullmatch=True), min_size=1, max_size=6, unique=True
    )
)
def test_short_names_stay_different(names: list[str]) -> None:
    found = labels(names)
    assert len(set(found)) == len(names) and all(found)
    assert all(name.endswith(label) for name, label in zip(names, found, strict=True))
