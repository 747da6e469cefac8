"""What all charts share: colours of the losses, a figure, logarithmic axes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bokeh.models import FixedTicker, HoverTool, MultiLine, Scatter
from bokeh.plotting import figure

from specforge_exp.report.collect import SweepRun
from specforge_exp.report.ranking import RankingRow
from specforge_exp.report.text import title_of

PALETTE = (
    "#2f6fde", "#e07b16", "#159a80", "#b8429e", "#8b6f1e", "#5b6b83", "#d6455d", "#5f9c2f",
)  # fmt: skip
"""Colours of the losses, in the order in which the sweep has them."""
INK, FAINT = "#33404f", "#8592a3"
FORMAT = "{0.[0000]}"
"""Of measured numbers in tooltips."""
VALUE = "@value" + FORMAT
Row = TypeVar("Row", SweepRun, RankingRow)


@dataclass(frozen=True)
class Chart:
    """A chart on the page."""

    key: str
    title: str
    note: str
    figure: Any
    wide: bool = False
    """Over the whole width of the page."""
    sources: tuple[str, ...] = ()
    """Names of what the reader may choose between; columns of the glyphs begin with them."""
    steps: tuple[str, ...] = ()
    """A second choice; columns are `<source>:<step>`."""
    chosen: tuple[str, str] = ("", "")
    """What is drawn first."""

    def __post_init__(self) -> None:
        for tool in self.figure.select(type=HoverTool):
            marks = (Scatter, MultiLine)
            tool.renderers = [r for r in self.figure.renderers if isinstance(r.glyph, marks)]


def drawn(*charts: Chart | None) -> list[Chart]:
    """The charts that there is data for."""
    return [chart for chart in charts if chart is not None]


def colours(runs: Sequence[SweepRun]) -> dict[str, str]:
    """A colour for every loss, the same in all charts."""
    losses = list(dict.fromkeys(run.loss for run in runs))
    return {loss: PALETTE[place % len(PALETTE)] for place, loss in enumerate(losses)}


def by_loss(
    rows: Sequence[Row], palette: Mapping[str, str]
) -> Iterator[tuple[list[Row], dict[str, str]]]:
    """The rows of each loss, in the palette's order, and how glyphs show which loss it is."""
    for loss, colour in palette.items():
        if group := [row for row in rows if row.loss == loss]:
            yield group, {"color": colour, "name": loss}


def new_figure(
    height: int, x_title: str, y_title: str, tooltips: list[tuple[str, str]], **options: Any
) -> Any:
    """An empty chart; theme.yaml has its looks, `tooltips` are (name, column)."""
    return figure(height=height, sizing_mode="stretch_width", tools="pan,wheel_zoom,reset,save",
                  tooltips=tooltips, x_axis_label=x_title, y_axis_label=y_title,
                  **options)  # fmt: skip


def logarithmic(axis: Any, values: Sequence[float]) -> None:
    """Tick a logarithmic axis at the values themselves when they are few, else at 1 and 3."""
    ticks = sorted(set(values))
    if len(ticks) > 5:
        decades = range(math.floor(math.log10(ticks[0])), math.ceil(math.log10(ticks[-1])) + 1)
        steps = (1, 3) if len(decades) <= 4 else (1,)
        ticks = [m * 10.0**e for e in decades for m in steps]
    axis.ticker = FixedTicker(ticks=ticks)
    axis.major_label_overrides = {tick: f"{tick:g}" for tick in ticks}


def heading(metric: str) -> str:
    """A metric at the beginning of a heading."""
    title = title_of(metric)
    return title[0].upper() + title[1:]


def spans_decades(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows the values better."""
    return min(values) > 0 and max(values) / min(values) >= 10
