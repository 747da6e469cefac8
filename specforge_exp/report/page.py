"""report.html: one file with everything in it, which asks no network for anything."""

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.resources import Resources
from bokeh.themes import Theme
from markupsafe import Markup

from specforge_exp.report.charts import benched, charts
from specforge_exp.report.collect import Collected
from specforge_exp.report.drawing import Chart, colours
from specforge_exp.report.ranking import Ranking, headline
from specforge_exp.report.single import distribution_chart
from specforge_exp.report.study_charts import study_charts
from specforge_exp.report.table import columns, total
from specforge_exp.report.text import measure, part, rendered, shown, title_of

LEFT = {"name", "loss", "status", "verdict"}
"""Columns of text, aligned to the left."""
SECTIONS = {
    "Comparison": "ranking rate",
    "Study": "pareto history",
    "Slices": "slice",
    "Curves": "loss simulated_length alpha unroll",
    "Data sets": "datasets distribution",
    "Cost": "cost",
}
"""Which charts stand below which heading, by what their keys begin with."""


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
    theme = Theme(Path(__file__).with_name("theme.yaml"))
    items = [
        {"key": chart.key, "item": json_item(chart.figure, ID(f"chart-{chart.key}"), theme)}
        for chart in drawn
    ]
    runs, data_sets = benched(by_seed)
    return rendered(
        "page.html",
        sweep=sweep,
        when=when,
        headline=headline(ranking),
        tiles=tiles(sweep, ranking),
        palette=colours(sweep.runs),
        tables=tables,
        tracked=any(run.tracker for run in sweep.runs),
        sort_key=sort_key,
        sections=sections(drawn),
        runs=runs,
        data_sets=data_sets,
        measure=measure,
        style=Markup(part("page.css")),
        script=Markup(part("page.js")),
        bokeh=Markup(bokeh_script()),
        items=Markup(as_script(items)),
    )


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


def when(text: str) -> str:
    """A time of sweep.json as people read it."""
    try:
        return f"{datetime.fromisoformat(text):%d %b %Y, %H:%M}"
    except ValueError:
        return text


def tiles(sweep: Collected, ranking: Ranking) -> list[tuple[str, str]]:
    """The few numbers at the top: (what, how much)."""
    best = ranking.ranked[0].value if ranking.ranked else None
    finished = f"{sweep.states.get('completed', 0)} / {len(sweep.runs)}"
    figures = [(f"best {title_of(ranking.metric)}", measure(best)), ("finished", finished)]
    for name, unit, form in (("gpu_hours", "GPU hours", "{:.3g}"), ("usd", "USD", "{:,.2f}")):
        totals = [value for e in ranking.entries if (value := total(e, name)) is not None]
        if totals:
            figures.append((unit, form.format(sum(totals))))
    return [(unit, value) for unit, value in figures if value]


def table(title: str, sweep: Collected, ranking: Ranking, seeds: bool) -> dict[str, Any]:
    """A table as the template wants it: its entries, and columns with whether they are of text."""

    def is_text(key: str, values: list[Any]) -> bool:
        return key in LEFT or any(isinstance(value, str) for value in values)

    entries = ranking.entries
    heads = [
        (column, is_text(column.key, [column.value(entry) for entry in entries]))
        for column in columns(sweep, ranking, seeds)
    ]
    return {"title": title, "columns": heads, "entries": entries}


def sort_key(value: Any) -> str:
    """What the page's script sorts a cell by; empty sorts last."""
    return repr(value) if isinstance(value, float) else shown(value)


def sections(drawn: list[Chart]) -> dict[str, list[Chart]]:
    """Charts below their headings."""
    by_title = {
        title: [c for key in keys.split() for c in drawn if c.key.partition("-")[0] == key]
        for title, keys in SECTIONS.items()
    }
    return {title: charts for title, charts in by_title.items() if charts}
