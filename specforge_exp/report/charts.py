"""The charts of every sweep: ranking, metric over learning rate, curves, data sets, cost."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FactorRange, FixedTicker, NumeralTickFormatter

from specforge_exp.report.collect import ACCEPTED, Collected, Curve, SweepRun
from specforge_exp.report.drawing import (
    FAINT,
    FORMAT,
    INK,
    Chart,
    colours,
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
SOURCES = ("training", "held-out")
LISTED = 40
"""Configurations in the chart of the ranking, at most; the table has all."""


def charts(sweep: Collected, ranking: Ranking) -> list[Chart]:
    """The charts that there is data for."""
    every_chart = [
        ranking_chart(sweep, ranking),
        rate_chart(sweep, ranking),
        *curve_charts(sweep.runs),
        unroll_chart(sweep.runs),
        data_set_chart(sweep, ranking),
        cost_chart(sweep, ranking),
    ]
    return [chart for chart in every_chart if chart is not None]


def by_loss(entries: Sequence[RankingRow]) -> dict[str, list[RankingRow]]:
    """Entries by the name of their loss, in the order of the entries."""
    groups: dict[str, list[RankingRow]] = {}
    for entry in entries:
        groups.setdefault(entry.runs[0].loss, []).append(entry)
    return groups


def entry_columns(entries: Sequence[RankingRow]) -> dict[str, list[Any]]:
    """Name, value and interval of entries, for a chart."""
    intervals = [entry.interval or (entry.value, entry.value) for entry in entries]
    return {
        "run": [entry.label for entry in entries],
        "value": [entry.value for entry in entries],
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
        "said": [interval_text(entry.interval) or "unknown" for entry in entries],
        "verdict": [entry.verdict for entry in entries],
    }


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
        ranking_height(ranking), y_range=FactorRange(factors=places),
        x_axis_label=title_of(ranking.metric),
        tooltips=[("run", "@run"), (ranking.metric, f"@value{{{FORMAT}}}"),
                  ("95 %", "@said"), ("beside the best", "@verdict")],
    )  # fmt: skip
    palette = colours(sweep.runs)
    chart.vspan(x=[entries[0].value], line_color=FAINT, line_dash="dotted", line_width=1)
    for loss, group in by_loss(entries).items():
        columns = entry_columns(group) | {"place": [f"{e.rank}. {e.label}" for e in group]}
        source = ColumnDataSource(columns)
        style = {"source": source, "color": palette[loss], "name": loss}
        chart.segment("low", "place", "high", "place", line_width=3, line_alpha=0.45, **style)
        chart.scatter("value", "place", size=9, **style)
    chart.ygrid.grid_line_color = None
    cut = f" The first {LISTED} of {len(ranking.ranked)}." if len(ranking.ranked) > LISTED else ""
    note = f"95 % intervals; the dotted line is the best.{cut}"
    return Chart("ranking", "Ranking", note, chart)


def rate_chart(sweep: Collected, ranking: Ranking) -> Chart | None:
    """The metric over the learning rate, a line per loss."""
    entries = [
        entry for entry in ranking.ranked
        if isinstance(rate := entry.runs[0].choices.get("lr"), int | float) and rate > 0
    ]  # fmt: skip
    rates = [float(entry.runs[0].choices["lr"]) for entry in entries]
    if len(set(rates)) < 2:
        return None
    chart = new_figure(
        ranking_height(ranking), x_axis_type="log", x_axis_label="learning rate",
        y_axis_label=title_of(ranking.metric),
        tooltips=[("run", "@run"), (ranking.metric, f"@value{{{FORMAT}}}"), ("95 %", "@said")],
    )  # fmt: skip
    palette = colours(sweep.runs)
    groups = by_loss(entries)
    for place, (loss, group) in enumerate(groups.items()):
        group.sort(key=lambda entry: float(entry.runs[0].choices["lr"]))
        aside = 1 + 0.012 * (place - (len(groups) - 1) / 2)  # so that intervals do not hide others
        at = [float(entry.runs[0].choices["lr"]) * aside for entry in group]
        source = ColumnDataSource(entry_columns(group) | {"lr": at})
        style = {"source": source, "color": palette[loss], "name": loss}
        if sweep.kind == "grid" and len(set(at)) == len(at):
            chart.line("lr", "value", line_width=1.5, line_alpha=0.7, **style)
        chart.segment("lr", "low", "lr", "high", line_width=2, line_alpha=0.45, **style)
        chart.scatter("lr", "value", size=8, **style)
    logarithmic(chart.xaxis, rates)
    note = "95 % intervals; losses stand a little beside each other so that all can be seen."
    return Chart("rate", f"{heading(ranking.metric)} against learning rate", note, chart)


def drawn(curve: Curve | None, most: int) -> tuple[np.ndarray, np.ndarray]:
    """A curve's points on the page, in few bytes."""
    if curve is None:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    positions = thin(curve.values, most)
    small = np.uint16 if curve.steps.max() < 2**16 else np.float32
    return curve.steps[positions].astype(small), rounded(curve.values[positions])


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 with 12 bits of mantissa: a fiftieth of a percent, and twice as well compressed."""
    exact = values.astype(np.float32).view(np.uint32)
    return ((exact + np.uint32(0x400)) & np.uint32(0xFFFFF800)).view(np.float32)


def line_chart(
    runs: Sequence[SweepRun],
    axis: str,
    columns: Callable[[SweepRun], dict[str, Any]],
    first: tuple[str, str],
    log_axis: bool = False,
) -> Any:
    """A line per run, coloured by loss; `columns` gives `<source>:x` and `<source>:<step>`."""
    chart = new_figure(
        320, x_axis_label="optimiser step", y_axis_label=axis,
        y_axis_type="log" if log_axis else "linear",
        tooltips=[("run", "@run"), ("step", "$data_x{0}"), (axis, f"$data_y{{{FORMAT}}}")],
    )  # fmt: skip
    palette = colours(runs)
    strong = 0.85 if len(runs) <= 12 else 0.6 if len(runs) <= 40 else 0.35
    for loss in palette:
        lines = [(run.label, columns(run)) for run in runs if run.loss == loss]
        data: dict[str, list[Any]] = {"run": [label for label, _ in lines]}
        for key in lines[0][1]:
            data[key] = [points[key] for _, points in lines]
        glyph = chart.multi_line(
            f"{first[0]}:x", ":".join(first), source=ColumnDataSource(data), name=loss,
            color=palette[loss], line_width=1.6, line_alpha=strong,
            hover_line_alpha=1.0, hover_line_color=palette[loss], hover_line_width=3.5,
        )  # fmt: skip
        glyph.nonselection_glyph = None
    chart.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return chart


def curve_charts(runs: Sequence[SweepRun]) -> list[Chart]:
    """Loss, simulated accepted length and acceptance rates over optimiser steps."""
    curves = []
    titles = {
        "loss": ("Loss", "Comparable within one loss only: each loss is a quantity of its own."),
        "simulated_length": ("Simulated accepted length", "Comparable between losses."),
    }
    for name, (title, note) in titles.items():
        keys = {"training": name, "held-out": f"eval/{name}"}
        there = sources_of(runs, keys)
        if not there:
            continue
        positive = all(
            (run.curves[key].values > 0).all()
            for run in runs for key in keys.values() if key in run.curves
        )  # fmt: skip

        def columns(run: SweepRun, keys: dict[str, str] = keys) -> dict[str, Any]:
            points = {source: drawn(run.curves.get(key), POINTS) for source, key in keys.items()}
            return {f"{source}:{axis}": both[place] for source, both in points.items()
                    for place, axis in enumerate(("x", "y"))}  # fmt: skip

        first = (there[-1] if name == "simulated_length" else there[0], "y")
        chart = line_chart(runs, title.lower(), columns, first, positive and name == "loss")
        curves.append(Chart(name, title, note, chart, sources=there, chosen=first))
    alpha = alpha_chart(runs)
    return [*curves, alpha] if alpha else curves


def sources_of(runs: Sequence[SweepRun], keys: dict[str, str]) -> tuple[str, ...]:
    """Which of training and held-out any run has."""
    return tuple(name for name, key in keys.items() if any(key in run.curves for run in runs))


def alpha_chart(runs: Sequence[SweepRun]) -> Chart | None:
    """Acceptance rates over optimiser steps, one unroll step at a time."""
    names = {key for run in runs for key in run.curves if "alpha/" in key}
    steps = sorted({int(key.rpartition("/")[2]) for key in names})
    keys = {"training": f"alpha/{min(steps, default=0)}"}
    keys["held-out"] = f"eval/{keys['training']}"
    there = sources_of(runs, keys)
    if not there:
        return None
    most = int(min(POINTS, max(20, ALPHA_POINTS // (len(runs) * (len(steps) + 1)))))

    def columns(run: SweepRun) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        for source in there:
            prefix = "eval/" if source == "held-out" else ""
            first = run.curves.get(keys[source])
            positions = thin(first.values, most) if first else np.zeros(0, int)
            arrays[f"{source}:x"] = drawn(first, most)[0]
            for step in steps:
                curve = run.curves.get(f"{prefix}alpha/{step}")
                same = (
                    first is not None
                    and curve is not None
                    and len(curve.values) == len(first.values)
                )
                values = (
                    curve.values[positions] if same and curve else np.full(len(positions), np.nan)
                )
                arrays[f"{source}:{step}"] = rounded(values)
        return arrays

    first = (there[0], str(steps[0]))
    chart = line_chart(runs, "acceptance rate", columns, first)
    note = (
        "α of one unroll step: the share of the draft's probability that the target accepts there. "
        "Comparable between losses."
    )
    choices = tuple(str(step) for step in steps)
    return Chart("alpha", "Acceptance rate α by unroll step", note, chart, sources=there,
                 steps=choices, chosen=first)  # fmt: skip


def unroll_chart(runs: Sequence[SweepRun]) -> Chart | None:
    """The newest evaluation's acceptance rate over the unroll steps, a line per run."""
    rates = {}
    for run in runs:
        steps = sorted(int(k[6:]) for k in run.evaluation if k.startswith("alpha/"))
        if steps:
            rates[run.name] = (steps, [run.evaluation[f"alpha/{k}"] for k in steps])
    if not rates:
        return None
    chart = new_figure(
        320, x_axis_label="unroll step", y_axis_label="held-out acceptance rate",
        tooltips=[("run", "@run"), ("α", f"$data_y{{{FORMAT}}}")],
    )  # fmt: skip
    palette = colours(runs)
    for loss, colour in palette.items():
        group = [run for run in runs if run.loss == loss and run.name in rates]
        if group:
            data = {
                "run": [run.label for run in group],
                "xs": [rates[run.name][0] for run in group],
                "ys": [rates[run.name][1] for run in group],
            }
            chart.multi_line(
                "xs", "ys", source=ColumnDataSource(data), color=colour, name=loss, line_width=1.6,
                line_alpha=0.7, hover_line_alpha=1.0, hover_line_color=colour, hover_line_width=3.5,
            )  # fmt: skip
    chart.xaxis.ticker = FixedTicker(
        ticks=sorted({k for steps, _ in rates.values() for k in steps})
    )
    note = "Newest evaluation of each run: how fast acceptance falls along the drafted chain."
    return Chart("unroll", "Acceptance rate along the chain", note, chart)


def data_set_chart(sweep: Collected, ranking: Ranking) -> Chart | None:
    """bench's accepted length with its interval, by data set."""
    placed = [run for entry in ranking.entries for run in entry.runs if run.datasets]
    runs = sorted(placed, key=lambda run: -(run.metric(ACCEPTED) or 0.0))[:24]
    names = list(dict.fromkeys(name for run in runs for name in run.datasets))
    if not names:
        return None
    chart = new_figure(
        380, x_range=FactorRange(factors=names), y_axis_label="accepted length τ",
        tooltips=[("run", "@run"), ("τ", f"@value{{{FORMAT}}}"), ("95 %", "@said"),
                  ("prompts", "@prompts")],
    )  # fmt: skip
    palette = colours(sweep.runs)
    for loss, colour in palette.items():
        data: dict[str, list[Any]] = {
            key: [] for key in "run at value low high said prompts".split()
        }
        for place, run in enumerate(runs):
            if run.loss != loss:
                continue
            aside = 0.8 * ((place + 0.5) / len(runs) - 0.5)
            for name, figures in run.datasets.items():
                has_interval = figures.low is not None and figures.high is not None
                between = (
                    (figures.low or 0.0, figures.high or 0.0)
                    if has_interval
                    else (figures.value, figures.value)
                )
                row = (run.label, (name, aside), figures.value, *between,
                       interval_text(between) if has_interval else "unknown",
                       figures.prompts)  # fmt: skip
                for key, value in zip(data, row, strict=True):
                    data[key].append(value)
        if data["run"]:
            style = {"source": ColumnDataSource(data), "color": colour, "name": loss}
            chart.segment("at", "low", "at", "high", line_width=2, line_alpha=0.45, **style)
            chart.scatter("at", "value", size=7, **style)
    chart.xgrid.grid_line_color = None
    cut = f" The best {len(runs)} of {len(placed)} runs." if len(placed) > len(runs) else ""
    note = f"Mean over prompts of tokens per verification, 95 % intervals; longest first.{cut}"
    return Chart("datasets", "Accepted length τ by data set", note, chart, wide=True)


def cost_chart(sweep: Collected, ranking: Ranking) -> Chart | None:
    """The metric over what training took."""
    entries = [e for e in ranking.ranked if any(run.gpu_hours for run in e.runs)]
    if len(entries) < 2 or ranking.metric == "gpu_hours":
        return None
    hours = [sum(run.gpu_hours or 0.0 for run in e.finished) / len(e.finished) for e in entries]
    if max(hours) < 1.05 * min(hours):
        return None
    chart = new_figure(
        320, x_axis_label="GPU hours of one run", y_axis_label=title_of(ranking.metric),
        x_axis_type="log" if spans_decades(hours) else "linear",
        tooltips=[("run", "@run"), ("GPU hours", "@hours{0.[000]}"),
                  (ranking.metric, f"@value{{{FORMAT}}}"), ("95 %", "@said")],
    )  # fmt: skip
    palette = colours(sweep.runs)
    took = {id(entry): hour for entry, hour in zip(entries, hours, strict=True)}
    for loss, group in by_loss(entries).items():
        data = entry_columns(group) | {"hours": [took[id(entry)] for entry in group]}
        style = {"source": ColumnDataSource(data), "color": palette[loss], "name": loss}
        chart.segment("hours", "low", "hours", "high", line_width=2, line_alpha=0.4, **style)
        chart.scatter("hours", "value", size=8, line_color=INK, line_alpha=0.2, **style)
    note = "GPUs times hours of training; on a machine without GPUs, processes times hours."
    return Chart("cost", f"{heading(ranking.metric)} against GPU hours", note, chart)
