"""The charts of a study: history, slices through the space, and what cannot both be had."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from bokeh.models import FactorRange

from specforge_exp.report.collect import Collected, SweepRun
from specforge_exp.report.drawing import (
    FORMAT,
    INK,
    VALUE,
    Chart,
    by_loss,
    colours,
    drawn,
    heading,
    logarithmic,
    new_figure,
    spans_decades,
)
from specforge_exp.report.ranking import counts
from specforge_exp.report.text import shown, title_of

SLICES = 16
"""Parameters that get a chart, at most."""
MARKS = {"completed": "circle", "pruned": "x", "failed": "x", "running": "circle_dot"}


def study_charts(sweep: Collected, metric: str) -> list[Chart]:
    """History and slices of a study; the Pareto front wherever there are two objectives."""
    charts = [pareto_chart(sweep)] if len(sweep.directions) > 1 else []
    if sweep.kind == "study":
        names = dict.fromkeys(key for run in sweep.runs for key in run.params)
        charts.append(history_chart(sweep, metric))
        charts += [slice_chart(sweep, metric, name) for name in list(names)[:SLICES]]
    return drawn(*charts)


def history_chart(sweep: Collected, metric: str) -> Chart | None:
    """Trials in their order, with the best so far."""
    measured = [run for run in sweep.runs if run.metric(metric) is not None]
    measured.sort(key=lambda run: run.number)
    if not measured:
        return None
    chart = new_figure(
        320, "trial", title_of(metric),
        [("trial", "@number"), ("run", "@run"), (metric, VALUE), ("status", "@status")],
    )  # fmt: skip
    finished = [run for run in measured if counts(run)]
    if finished:
        best = accumulate(
            (run.metric(metric) or 0.0 for run in finished),
            min if sweep.minimised(metric) else max,
        )
        chart.step(
            [run.number for run in finished], list(best), mode="after", line_color=INK,
            line_width=1.5, line_alpha=0.6,
        )  # fmt: skip
    scatter(chart, sweep, measured, [run.number for run in measured], metric)
    lost = sum(run.status in ("failed", "pruned") and run not in measured for run in sweep.runs)
    cut = f" {lost} failed or pruned trials reported nothing." if lost else ""
    return Chart(
        "history",
        "History of trials",
        f"The line is the best so far; x: pruned or failed.{cut}",
        chart,
    )


def scatter(
    chart: Any, sweep: Collected, runs: Sequence[SweepRun], xs: Sequence[Any], metric: str
) -> None:
    """A mark per run at (its x, metric), coloured by loss; what did not finish is an x."""
    places = {run.name: x for run, x in zip(runs, xs, strict=True)}
    for group, colour in by_loss(runs, colours(sweep.runs)):
        data = {
            "x": [places[run.name] for run in group],
            "run": [run.label for run in group],
            "number": [run.number for run in group],
            "status": [run.status for run in group],
            "mark": [MARKS.get(run.status, "circle") for run in group],
            "value": [run.metric(metric) for run in group],
        }
        chart.scatter("x", "value", marker="mark", size=8, fill_alpha=0.75, source=data, **colour)


def slice_chart(sweep: Collected, metric: str, name: str) -> Chart | None:
    """The metric over one parameter, of the trials that have both."""
    runs = [r for r in sweep.runs if name in r.choices and r.metric(metric) is not None]
    values = [run.choices[name] for run in runs]
    if len({str(value) for value in values}) < 2:
        return None
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    log_axis = numeric and spans_decades(values)
    options: dict[str, Any] = {"x_axis_type": "log"} if log_axis else {}
    if not numeric:
        values = [shown(value) for value in values]
        options = {"x_range": FactorRange(factors=sorted(set(values)))}
    chart = new_figure(
        260, name, title_of(metric),
        [("run", "@run"), (name, "@x"), (metric, VALUE), ("status", "@status")], **options,
    )  # fmt: skip
    if log_axis:
        logarithmic(chart.xaxis, values)
    scatter(chart, sweep, runs, values, metric)
    return Chart(f"slice-{name}", name, "", chart)


def pareto_chart(sweep: Collected) -> Chart | None:
    """The first two objectives, and the runs that no other beats in both."""
    (one, one_goes), (two, two_goes) = list(sweep.directions.items())[:2]
    runs = [r for r in sweep.runs if r.metric(one) is not None and r.metric(two) is not None]
    if not runs:
        return None
    signs = [-1 if goes == "minimize" else 1 for goes in (one_goes, two_goes)]
    points = [(r.metric(one) or 0.0, r.metric(two) or 0.0) for r in runs]
    best = front([(x * signs[0], y * signs[1]) for r, (x, y) in zip(runs, points, strict=True)
                  if counts(r)])  # fmt: skip
    chart = new_figure(
        360, f"{title_of(one)} ({one_goes})", f"{title_of(two)} ({two_goes})",
        [("run", "@run"), (one, "@x" + FORMAT), (two, VALUE), ("status", "@status")],
    )  # fmt: skip
    xs = [x * signs[0] for x, _ in best]
    chart.line(xs, [y * signs[1] for _, y in best], line_color=INK, line_width=1.5, line_alpha=0.6)
    scatter(chart, sweep, runs, [x for x, _ in points], two)
    more = f" Objectives beyond the first two: {', '.join(list(sweep.directions)[2:])}."
    note = "The line joins the runs that no other beats in both."
    return Chart("pareto", f"{heading(two)} against {title_of(one)}",
                 note + (more if len(sweep.directions) > 2 else ""), chart)  # fmt: skip


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points where more is better, those that none is better than in both; by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best
