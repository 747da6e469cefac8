"""What the report collects of runs: where they lie, what they cost, what they are called."""

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
