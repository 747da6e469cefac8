"""What a report shows of a study: slices, its history, the front of two objectives."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from sweep_folders import study, write_sweep

from specforge_exp.config import ReportConfig
from specforge_exp.report.collect import collect
from specforge_exp.report.study_charts import front, study_charts
from specforge_exp.stages.report import make


def test_a_study_has_slices_a_history_and_a_front(tmp_path: Path) -> None:
    goals = [("simulated_length", "maximize"), ("gpu_hours", "minimize")]
    objectives = [{"name": name, "direction": goes} for name, goes in goals]
    sweep_dir = write_sweep(tmp_path, study(), kind="study", objectives=objectives)
    found = collect(sweep_dir)
    drawn = {chart.key: chart for chart in study_charts(found, "simulated_length")}
    assert set(drawn) == {"pareto", "history", "slice-lr", "slice-loss.beta", "slice-loss"}
    assert found.runs[0].label == "trial 0"
    make(sweep_dir, ReportConfig(resamples=50))
    assert "the loss is nan at step 3" in (sweep_dir / "report.md").read_text()
    assert "the loss is nan at step 3" in (sweep_dir / "report.html").read_text()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beaten(one: tuple[int, int]) -> bool:
        return any(o != one and o[0] >= one[0] and o[1] >= one[1] for o in points)

    assert sorted(front(points)) == sorted({one for one in points if not beaten(one)})
