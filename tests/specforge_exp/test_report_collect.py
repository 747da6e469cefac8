"""What the report collects of runs: where they lie, what they cost, what they are called."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_folders import grid, write_sweep
from test_published import RESULT
from test_report import change

from specforge_exp.config import ReportConfig
from specforge_exp.report.collect import collect, labels
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
