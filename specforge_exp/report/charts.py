"""The charts of every sweep: ranking, metric over learning rate, curves, data sets, cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FactorRange, FixedTicker, NumeralTickFormatter

from specforge_exp.report.collect import ACCEPTED, Collected, DataSet, SweepRun
from specforge_exp.report.drawing import (
    FAINT,
    FORMAT,
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
from specforge_exp.report.ranking import Ranking, RankingRow
from specforge_exp.report.statistics import thin
from specforge_exp.report.text import interval_text, title_of

POINTS = 200
"""Points of a curve on the page, at most."""
ALPHA_POINTS = 320_000
"""Values of all curves of acceptance rates together: many runs get fewer points each."""
LISTED = 40
"""Configurations in the chart of the ranking, at most; the table has all."""


def charts(sweep: Collected, ranking: Ranking) -> list[Chart]:
    """The charts that there is data for."""
    return drawn(
        ranking_chart(sweep, ranking),
        rate_chart(sweep, ranking),
        *curve_charts(sweep.runs),
        alpha_chart(sweep.runs),
        unroll_chart(sweep.runs),
        data_set_chart(sweep, ranking),
        cost_chart(sweep, ranking),
    )


def value_columns(measured: Sequence[RankingRow | DataSet]) -> dict[str, list[Any]]:
    """Values and their intervals, for a chart."""
    intervals = [row.interval or (row.value, row.value) for row in measured]
    return {
        "value": [row.value for row in measured],
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
        "said": [interval_text(row.interval) or "unknown" for row in measured],
    }


def entry_columns(entries: Sequence[RankingRow]) -> dict[str, list[Any]]:
    """Name, value and interval of entries, for a chart."""
    names = {"run": [entry.label for entry in entries]}
    return names | value_columns(entries) | {"verdict": [entry.verdict for entry in entries]}


def value_marks(chart: Any, x: str, **style: Any) -> None:
    """Values over a column, with their intervals."""
    chart.segment(x, "low", x, "high", line_width=2, line_alpha=0.45, **style)
    chart.scatter(x, "value", size=8, **style)


def value_tooltips(metric: str, *before: tuple[str, str]) -> list[tuple[str, str]]:
    """A run's value and its interval, for the reader who points at it."""
    return [("run", "@run"), *before, (metric, VALUE), ("95 %", "@said")]


def ranking_height(ranking: Ranking) -> int:
    """Pixels, of the ranking and of what stands beside it."""
    count = max(11, min(LISTED, len(ranking.ranked)))
    return 90 + count * (22 if count <= 20 else 16)


def ranking_chart(sweep: Collected, ranking: Ranking) -> Chart | None:
    """Every configuration with its interval, best on top."""
    entries = ranking.ranked[:LISTED]
    if not entries:
        return None
    places = [f"{e.rank}. {e.label}" for e in reversed(entries)]
    chart = new_figure(
        ranking_height(ranking), title_of(ranking.metric), "",
        [*value_tooltips(ranking.metric), ("beside the best", "@verdict")],
        y_range=FactorRange(factors=places),
    )  # fmt: skip
    chart.vspan(x=[entries[0].value], line_color=FAINT, line_dash="dotted", line_width=1)
    for group, colour in by_loss(entries, colours(sweep.runs)):
        columns = entry_columns(group) | {"place": [f"{e.rank}. {e.label}" for e in group]}
        style = {"source": ColumnDataSource(columns), **colour}
        chart.segment("low", "place", "high", "place", line_width=3, line_alpha=0.45, **style)
        chart.scatter("value", "place", size=9, **style)
    chart.ygrid.grid_line_color = None
    cut = f" The first {LISTED} of {len(ranking.ranked)}." if len(ranking.ranked) > LISTED else ""
    note = f"95 % intervals; the dotted line is the best.{cut}"
    return Chart("ranking", "Ranking", note, chart)


def rate_chart(sweep: Collected, ranking: Ranking) -> Chart | None:
    """The metric over the learning rate, a line per loss."""
    entries = [entry for entry in ranking.ranked if learning_rate(entry) > 0]
    rates = [learning_rate(entry) for entry in entries]
    if len(set(rates)) < 2:
        return None
    chart = new_figure(
        ranking_height(ranking), "learning rate", title_of(ranking.metric),
        value_tooltips(ranking.metric), x_axis_type="log",
    )  # fmt: skip
    groups = list(by_loss(entries, colours(sweep.runs)))
    for place, (group, colour) in enumerate(groups):
        group.sort(key=learning_rate)
        aside = 1 + 0.012 * (place - (len(groups) - 1) / 2)  # so that intervals do not hide others
        at = [learning_rate(entry) * aside for entry in group]
        style = {"source": ColumnDataSource(entry_columns(group) | {"lr": at}), **colour}
        if sweep.kind == "grid" and len(set(at)) == len(at):
            chart.line("lr", "value", line_width=1.5, line_alpha=0.7, **style)
        value_marks(chart, "lr", **style)
    logarithmic(chart.xaxis, rates)
    note = "95 % intervals; losses stand a little beside each other so that all can be seen."
    return Chart("rate", f"{heading(ranking.metric)} against learning rate", note, chart)


def learning_rate(entry: RankingRow) -> float:
    """What an entry was trained with; 0 where that is not known."""
    rate = entry.runs[0].choices.get("lr")
    return float(rate) if isinstance(rate, int | float) else 0.0


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 with 12 bits of mantissa: a fiftieth of a percent, and twice as well compressed."""
    exact = values.astype(np.float32).view(np.uint32)
    return ((exact + np.uint32(0x400)) & np.uint32(0xFFFFF800)).view(np.float32)


def curve_columns(
    run: SweepRun, keys: dict[str, dict[str, str]], most: int
) -> dict[str, np.ndarray]:
    """`<source>:x` and `<source>:<step>` of a run, in few bytes.

    Args:
        run: the run.
        keys: names of curves, by source and step.
        most: points of a curve; all curves of a source have those of its first one.
    """
    arrays: dict[str, np.ndarray] = {}
    for source, key_of in keys.items():
        curves = [run.curves.get(key) for key in key_of.values()]
        first = curves[0]
        positions = thin(first.values, most) if first else np.zeros(0, int)
        small = np.uint16 if first and first.steps.max() < 2**16 else np.float32
        arrays[f"{source}:x"] = (first.steps[positions] if first else positions).astype(small)
        for step, curve in zip(key_of, curves, strict=True):
            values = np.full(len(positions), np.nan)
            if first and curve and len(curve.values) == len(first.values):
                values = curve.values[positions]
            arrays[f"{source}:{step}"] = rounded(values)
    return arrays


def line_chart(
    runs: Sequence[SweepRun],
    axis: str,
    keys: dict[str, dict[str, str]],
    first: tuple[str, str],
    most: int = POINTS,
    log_axis: bool = False,
) -> Any:
    """A line per run, coloured by loss; `first` is what is drawn of its `curve_columns`."""
    chart = new_figure(
        320, "optimiser step", axis,
        [("run", "@run"), ("step", "$data_x{0}"), (axis, "$data_y" + FORMAT)],
        y_axis_type="log" if log_axis else "linear",
    )  # fmt: skip
    strong = 0.85 if len(runs) <= 12 else 0.6 if len(runs) <= 40 else 0.35
    for group, colour in by_loss(runs, colours(runs)):
        lines = [curve_columns(run, keys, most) for run in group]
        data: dict[str, list[Any]] = {"run": [run.label for run in group]}
        data |= {column: [arrays[column] for arrays in lines] for column in lines[0]}
        glyph = draw_lines(chart, f"{first[0]}:x", ":".join(first), data, colour, strong)
        glyph.nonselection_glyph = None
    chart.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return chart


def draw_lines(
    chart: Any, xs: str, ys: str, data: dict[str, list[Any]], colour: dict[str, str], alpha: float
) -> Any:
    """A line per run, which stands out when the reader points at it."""
    return chart.multi_line(
        xs, ys, source=data, line_width=1.6, line_alpha=alpha, **colour,
        hover_line_alpha=1.0, hover_line_color=colour["color"], hover_line_width=3.5,
    )  # fmt: skip


def curve_charts(runs: Sequence[SweepRun]) -> list[Chart]:
    """Loss and simulated accepted length over optimiser steps."""
    curves = []
    titles = {
        "loss": ("Loss", "Comparable within one loss only: each loss is a quantity of its own."),
        "simulated_length": ("Simulated accepted length", "Comparable between losses."),
    }
    for name, (title, note) in titles.items():
        keys = {"training": {"y": name}, "held-out": {"y": f"eval/{name}"}}
        there = sources_of(runs, keys)
        if not there:
            continue
        log_axis = name == "loss" and all(
            (run.curves[key].values > 0).all()
            for run in runs for key in (name, f"eval/{name}") if key in run.curves
        )  # fmt: skip
        first = (there[-1] if name == "simulated_length" else there[0], "y")
        chart = line_chart(runs, title.lower(), keys, first, log_axis=log_axis)
        curves.append(Chart(name, title, note, chart, sources=there, chosen=first))
    return curves


def sources_of(runs: Sequence[SweepRun], keys: dict[str, dict[str, str]]) -> tuple[str, ...]:
    """Which of training and held-out any run has."""
    first = {source: next(iter(key_of.values())) for source, key_of in keys.items()}
    return tuple(name for name, key in first.items() if any(key in run.curves for run in runs))


def alpha_chart(runs: Sequence[SweepRun]) -> Chart | None:
    """Acceptance rates over optimiser steps, one unroll step at a time."""
    names = {key for run in runs for key in run.curves if "alpha/" in key}
    steps = sorted({int(key.rpartition("/")[2]) for key in names})
    if not steps:
        return None
    prefixes = {"training": "", "held-out": "eval/"}
    keys = {
        source: {str(step): f"{prefix}alpha/{step}" for step in steps}
        for source, prefix in prefixes.items()
    }
    there = sources_of(runs, keys)
    most = int(min(POINTS, max(20, ALPHA_POINTS // (len(runs) * (len(steps) + 1)))))
    first = (there[0], str(steps[0]))
    chart = line_chart(runs, "acceptance rate", {s: keys[s] for s in there}, first, most)
    note = (
        "α of one unroll step: the share of the draft's probability that the target accepts there. "
        "Comparable between losses."
    )
    return Chart("alpha", "Acceptance rate α by unroll step", note, chart, sources=there,
                 steps=tuple(map(str, steps)), chosen=first)  # fmt: skip


def unroll_chart(runs: Sequence[SweepRun]) -> Chart | None:
    """The newest evaluation's acceptance rate over the unroll steps, a line per run."""
    rates: dict[str, dict[int, float]] = {}
    for run in runs:
        alphas = {k: v for k, v in run.evaluation.items() if k.startswith("alpha/")}
        rates[run.name] = dict(sorted((int(k[6:]), v) for k, v in alphas.items()))
    steps = sorted({step for alphas in rates.values() for step in alphas})
    if not steps:
        return None
    chart = new_figure(
        320, "unroll step", "held-out acceptance rate",
        [("run", "@run"), ("α", "$data_y" + FORMAT)],
    )  # fmt: skip
    for group, colour in by_loss([run for run in runs if rates[run.name]], colours(runs)):
        data: dict[str, list[Any]] = {
            "run": [run.label for run in group],
            "xs": [list(rates[run.name]) for run in group],
            "ys": [list(rates[run.name].values()) for run in group],
        }
        draw_lines(chart, "xs", "ys", data, colour, 0.7)
    chart.xaxis.ticker = FixedTicker(ticks=steps)
    note = "Newest evaluation of each run: how fast acceptance falls along the drafted chain."
    return Chart("unroll", "Acceptance rate along the chain", note, chart)


def benched(ranking: Ranking) -> tuple[list[SweepRun], list[str]]:
    """The runs that bench measured, the longest accepted length first, and their data sets."""
    runs = [run for entry in ranking.entries for run in entry.runs if run.datasets]
    runs.sort(key=lambda run: -(run.metric(ACCEPTED) or 0.0))
    return runs, list(dict.fromkeys(name for run in runs for name in run.datasets))


def data_set_chart(sweep: Collected, ranking: Ranking) -> Chart | None:
    """bench's accepted length with its interval, by data set."""
    placed, names = benched(ranking)
    runs = placed[:24]
    if not names:
        return None
    chart = new_figure(
        380, "", "accepted length τ", [*value_tooltips("τ"), ("prompts", "@prompts")],
        x_range=FactorRange(factors=names),
    )  # fmt: skip
    asides = {run.name: 0.8 * ((i + 0.5) / len(runs) - 0.5) for i, run in enumerate(runs)}
    for group, colour in by_loss(runs, colours(sweep.runs)):
        marks = [(run, name) for run in group for name in run.datasets]
        figures = [run.datasets[name] for run, name in marks]
        data = {
            "run": [run.label for run, _ in marks],
            "at": [(name, asides[run.name]) for run, name in marks],
            **value_columns(figures),
            "prompts": [measured.prompts for measured in figures],
        }
        value_marks(chart, "at", source=ColumnDataSource(data), **colour)
    chart.xgrid.grid_line_color = None
    cut = f" The best {len(runs)} of {len(placed)} runs." if len(placed) > len(runs) else ""
    note = f"Mean over prompts of tokens per verification, 95 % intervals; longest first.{cut}"
    return Chart("datasets", "Accepted length τ by data set", note, chart, wide=True)


def cost_chart(sweep: Collected, ranking: Ranking) -> Chart | None:
    """The metric over what training took."""
    entries = [entry for entry in ranking.ranked if entry.mean("gpu_hours")]
    if len(entries) < 2 or ranking.metric == "gpu_hours":
        return None
    hours = [entry.mean("gpu_hours") or 0.0 for entry in entries]
    if max(hours) < 1.05 * min(hours):
        return None
    chart = new_figure(
        320, "GPU hours of one run", title_of(ranking.metric),
        value_tooltips(ranking.metric, ("GPU hours", "@hours{0.[000]}")),
        x_axis_type="log" if spans_decades(hours) else "linear",
    )  # fmt: skip
    for group, colour in by_loss(entries, colours(sweep.runs)):
        data = entry_columns(group) | {"hours": [entry.mean("gpu_hours") for entry in group]}
        value_marks(chart, "hours", source=ColumnDataSource(data), **colour)
    note = "GPUs times hours of training; on a machine without GPUs, processes times hours."
    return Chart("cost", f"{heading(ranking.metric)} against GPU hours", note, chart)
