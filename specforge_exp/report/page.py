"""report.html: one file with everything in it, which asks no network for anything."""

import json
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.resources import Resources
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from specforge_exp.report.charts import charts
from specforge_exp.report.collect import ACCEPTED, Collected, SweepRun
from specforge_exp.report.drawing import Chart, colours
from specforge_exp.report.ranking import Ranking, RankingRow, headline
from specforge_exp.report.single import distribution_chart
from specforge_exp.report.study_charts import study_charts
from specforge_exp.report.table import Column, columns, status_counts, total
from specforge_exp.report.text import measure, shown, title_of

LEFT = {"name", "loss", "status", "verdict"}
"""Columns of text, aligned to the left."""


def page(sweep: Collected, ranking: Ranking, by_seed: Ranking) -> str:
    """The page as HTML.

    Args:
        sweep: what was collected.
        ranking: its configurations, ranked.
        by_seed: its runs, ranked each by itself; shown where the two differ.
    """
    drawn = charts(sweep, ranking) + study_charts(sweep, ranking.metric)
    if spread := distribution_chart(sweep.runs):
        drawn.append(spread)
    tables = [table("Ranking", sweep, ranking, False)]
    if ranking.several_seeds:
        tables = [
            table("Ranking of configurations, over seeds", sweep, ranking, False),
            table("Every run", sweep, by_seed, True),
        ]
    palette = colours(sweep.runs)
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).from_string(part("page.html"))
    return template.render(
        sweep=sweep,
        counts=status_counts(sweep),
        states={s: sum(r.status == s for r in sweep.runs) for s in states(sweep)},
        started=when(sweep.started),
        updated=when(sweep.updated),
        headline=headline(ranking),
        tiles=tiles(sweep, ranking),
        legend=palette if len(palette) > 1 else {},
        tables=tables,
        sections=sections(drawn),
        data_sets=data_set_table(by_seed),
        published=[(run, b) for run in sweep.runs for b in run.published],
        failures=[run for run in sweep.runs if run.error],
        metric=ranking.metric,
        style=Markup(part("page.css")),
        script=Markup(part("page.js")),
        bokeh=Markup(bokeh_script()),
        items=Markup(as_script([item(chart) for chart in drawn])),
    )


def part(name: str) -> str:
    """A file that lies beside this one."""
    return files("specforge_exp.report").joinpath(name).read_text(encoding="utf-8")


@cache
def bokeh_script() -> str:
    """Bokeh's core, which draws all charts; tables, widgets, WebGL and MathJax stay away.

    It has names that look like addresses (namespaces, licences); `\\/` is `/` to JavaScript, and a
    search of the page for addresses finds none.
    """
    source: str = Resources(mode="inline", components=["bokeh"]).js_raw[0]
    return source.replace("</script", "<\\/script").replace("://", ":\\/\\/")


def as_script(content: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def item(chart: Chart) -> dict[str, Any]:
    """A chart as the page's script takes it."""
    return {"key": chart.key, "item": json_item(chart.figure, ID(f"chart-{chart.key}"))}


def states(sweep: Collected) -> list[str]:
    """The statuses that runs have, in the order in which a run has them."""
    order = ["completed", "running", "planned", "pruned", "failed"]
    statuses = {run.status for run in sweep.runs}
    return [s for s in order if s in statuses] + sorted(statuses - set(order))


def when(text: str) -> str:
    """A time of sweep.json as people read it."""
    try:
        return f"{datetime.fromisoformat(text):%d %b %Y, %H:%M}"
    except ValueError:
        return text


def tiles(sweep: Collected, ranking: Ranking) -> list[tuple[str, str]]:
    """The few numbers at the top: (what, how much)."""
    best = ranking.ranked[0].value if ranking.ranked else None
    done = sum(run.status == "completed" for run in sweep.runs)
    figures = [
        (f"best {title_of(ranking.metric)}", measure(best)),
        ("finished", f"{done} / {len(sweep.runs)}"),
    ]
    for name, unit, form in (("gpu_hours", "GPU hours", "{:.3g}"), ("usd", "USD", "{:,.2f}")):
        totals = [value for e in ranking.entries if (value := total(e, name)) is not None]
        if totals:
            figures.append((unit, form.format(sum(totals))))
    return [(unit, value) for unit, value in figures if value]


def table(title: str, sweep: Collected, ranking: Ranking, seeds: bool) -> dict[str, Any]:
    """A table as the template wants it; a cell is (key, text, interval, sort key, is text)."""
    table_columns = [(c, is_text(c, ranking.entries)) for c in columns(sweep, ranking, seeds)]
    palette = colours(sweep.runs)
    rows = []
    for entry in ranking.entries:
        first = entry.runs[0]
        cells = [
            (c.key, c.text(entry), c.between and c.between(entry), sort_key(c.value(entry)), text)
            for c, text in table_columns
        ]  # fmt: skip
        rows.append(
            {
                "cells": cells,
                "entry": entry,
                "names": ", ".join(run.name for run in entry.runs),
                "colour": palette[first.loss],
                "loss": first.loss,
                "commands": "\n".join(run.command for run in entry.runs),
                "tracker": first.tracker,
            }
        )
    heads = [(c.key, c.title, text) for c, text in table_columns]
    tracked = any(run.tracker for run in sweep.runs)
    return {"title": title, "tracked": tracked, "columns": heads, "rows": rows}


def is_text(column: Column, entries: list[RankingRow]) -> bool:
    """Whether a column is aligned to the left."""
    return column.key in LEFT or any(isinstance(column.value(e), str) for e in entries)


def sort_key(value: Any) -> str:
    """What the page's script sorts a cell by; empty sorts last."""
    return repr(value) if isinstance(value, float) else shown(value)


def sections(drawn: list[Chart]) -> list[tuple[str, list[Chart]]]:
    """Charts below their headings."""
    by_key = {chart.key: chart for chart in drawn}
    keys = {
        "Comparison": ["ranking", "rate"],
        "Study": ["pareto", "history"],
        "Slices": [key for key in by_key if key.startswith("slice-")],
        "Curves": ["loss", "simulated_length", "alpha", "unroll"],
        "Data sets": ["datasets", "distribution"],
        "Cost": ["cost"],
    }
    filled = [(title, [by_key[k] for k in listed if k in by_key]) for title, listed in keys.items()]
    return [(title, charts) for title, charts in filled if charts]


def data_set_table(by_seed: Ranking) -> dict[str, Any]:
    """Accepted length by run and data set, with intervals: (run, average, cells)."""
    runs = [run for entry in by_seed.entries for run in entry.runs if run.datasets]
    names = list(dict.fromkeys(name for run in runs for name in run.datasets))
    runs.sort(key=lambda run: -(run.metric(ACCEPTED) or 0.0))
    return {
        "names": names,
        "rows": [(run, measure(run.metric(ACCEPTED), 3), cells(run, names)) for run in runs],
    }


def cells(run: SweepRun, names: list[str]) -> list[tuple[str, str]]:
    """(value, interval) of a run on every data set; empty where it was not measured."""
    texts = []
    for name in names:
        figures = run.datasets.get(name)
        interval = figures and figures.interval
        between = "{:.2f} to {:.2f}".format(*interval) if interval else ""
        texts.append((f"{figures.value:.2f}" if figures else "", between))
    return texts
