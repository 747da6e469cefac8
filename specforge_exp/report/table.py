"""The table of runs as Markdown and CSV, and all curves as CSV."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from specforge_exp.records import replacing
from specforge_exp.report.collect import ACCEPTED, Collected, metric_lines
from specforge_exp.report.ranking import Ranking, RankingRow, headline
from specforge_exp.report.record import number
from specforge_exp.report.text import interval_text, measure, rendered, shown, title_of

BESIDE = ("simulated_length", ACCEPTED, "loss", "alpha/0")
"""Metrics that have a column in every table, where a run has them."""


@dataclass(frozen=True)
class Column:
    """A column of the tables on the page and in Markdown."""

    key: str
    title: str
    value: Callable[[RankingRow], Any]
    """What the column is sorted by: a number or a text; None: last."""
    special: Callable[[RankingRow], str] | None = None
    """Its text, where that is not its value's."""
    between: Callable[[RankingRow], str] | None = None
    """The interval of what it shows."""

    def text(self, entry: RankingRow) -> str:
        """What it shows of an entry."""
        return self.special(entry) if self.special else shown(self.value(entry))


def against_text(entry: RankingRow) -> str:
    """The difference to the best; empty for the best and without a rank."""
    return "" if entry.against is None or entry.rank == 1 else f"{entry.against.value:+.3f}"


def between_text(entry: RankingRow) -> str:
    """The interval of that difference; empty where the two are not paired."""
    if entry.against is None or entry.rank == 1 or entry.against.interval is None:
        return ""
    return "{:+.3f} to {:+.3f}".format(*entry.against.interval)


def varied(sweep: Collected) -> list[str]:
    """What the runs differ in, the loss and the learning rate first; those two in any case."""
    values: dict[str, set[str]] = {}
    for run in sweep.runs:
        for key, value in run.choices.items():
            values.setdefault(key, set()).add(json.dumps(value, default=str))
    names = [key for key in ("loss", "lr") if key in values]
    absent = {key for key in values if any(key not in run.choices for run in sweep.runs)}
    different = [key for key, options in values.items() if len(options) > 1 or key in absent]
    return names + [key for key in different if key not in ("loss", "lr", "seed")]


def choice_column(key: str) -> Column:
    """What an entry tried for a key."""
    return Column(key, key, lambda entry: entry.runs[0].choices.get(key))


def metric_column(name: str) -> Column:
    """A metric's mean over an entry's runs."""
    title = title_of(name)
    return Column(f"eval/{name}", title, lambda e: e.mean(name), lambda e: measure(e.mean(name)))


def cost_column(name: str) -> Column:
    """gpu_hours or usd of all runs of an entry."""
    title = title_of(name)
    return Column(name, title, lambda e: total(e, name), lambda e: measure(total(e, name), 3))


def status_text(entry: RankingRow) -> str:
    """Status, with the step of a run that is not finished."""
    run = entry.runs[0]
    at = f" at step {run.step}" if entry.status in ("running", "failed", "pruned") else ""
    return entry.status + (at if at and run.step is not None else "")


def total(entry: RankingRow, name: str) -> float | None:
    """gpu_hours or usd of all runs of an entry."""
    values = [value for run in entry.runs if (value := getattr(run, name)) is not None]
    return sum(values) if values else None


def columns(sweep: Collected, ranking: Ranking, seeds: bool) -> list[Column]:
    """The columns of a table; `seeds`: of runs by seed rather than of configurations."""
    table = [
        Column("rank", "#", lambda e: e.rank),
        Column("name", "run", lambda e: e.label),
        *map(choice_column, varied(sweep)),
    ]
    if seeds:
        table.append(choice_column("seed"))
    elif ranking.several_seeds:
        table.append(
            Column("seeds", "seeds", lambda e: e.seeds, lambda e: f"{e.seeds} of {len(e.runs)}")
        )
    table.append(
        Column("metric", title_of(ranking.metric), lambda e: e.value, lambda e: measure(e.value),
               lambda e: interval_text(e.interval))
    )  # fmt: skip
    if not seeds:  # between two seeds of one configuration there is nothing but training noise
        table += [
            Column("against", "beside the best", lambda e: e.against and e.against.value,
                   against_text, between_text),
            Column("verdict", "verdict", lambda e: e.verdict or None),
        ]  # fmt: skip
    hidden = (ranking.metric, "gpu_hours")
    beside = [n for n in dict.fromkeys((*BESIDE, *sweep.directions)) if n not in hidden]
    runs = sweep.runs
    table += [metric_column(n) for n in beside if any(run.metric(n) is not None for run in runs)]
    costs = ("gpu_hours", "usd")
    table += [cost_column(n) for n in costs if any(getattr(r, n) is not None for r in runs)]
    return [*table, Column("status", "status", lambda e: e.status, status_text)]


def markdown_table(table: list[Column], entries: list[RankingRow]) -> str:
    """A Markdown table whose columns also line up where it is only printed."""
    table = [shown_column for column in table for shown_column in with_interval(column)]
    rows = [[c.title for c in table]] + [[c.text(e) or "-" for c in table] for e in entries]
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def with_interval(column: Column) -> list[Column]:
    """A column and, where it has intervals, one of them."""
    if column.between is None:
        return [column]
    return [column, Column("between", "95 % interval", column.value, column.between)]


def markdown(sweep: Collected, ranking: Ranking, by_seed: Ranking) -> str:
    """report.md: what is best, the table, what failed and how to run each row again."""
    return rendered(
        "report.md.jinja",
        sweep=sweep,
        ranking=ranking,
        headline=headline(ranking),
        configurations=markdown_table(columns(sweep, ranking, False), ranking.entries),
        runs=markdown_table(columns(sweep, by_seed, True), by_seed.entries),
    )


@contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name when it is whole."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        yield file


def write_csv(path: Path, ranking: Ranking, by_seed: Ranking) -> None:
    """report.csv: one row per run, with everything the tables show.

    Columns from `group` to `verdict` are of the configuration, over its seeds; `tau/<data set>` are
    bench's.
    """
    groups = {run.name: entry for entry in ranking.entries for run in entry.runs}
    rows = []
    for entry in by_seed.entries:
        run = entry.runs[0]
        low, high = entry.interval or (None, None)
        row: dict[str, Any] = {
            "rank": entry.rank, "number": run.number, "run": run.name, "status": run.status,
            "step": run.step,
        }  # fmt: skip
        row |= {  # of a bench sweep `run` may be a choice, too
            key: json.dumps(value) if isinstance(value, list | dict) else value
            for key, value in run.choices.items() if key not in row
        }  # fmt: skip
        row |= {
            "metric": ranking.metric, "value": entry.value, "low": low, "high": high,
            **group_columns(groups[entry.name]),
            **{f"eval/{name}": value for name, value in sorted(run.evaluation.items())},
        }  # fmt: skip
        for name, data in run.datasets.items():
            low, high = data.interval or (None, None)
            row |= {f"tau/{name}": data.value, f"tau/{name}/low": low, f"tau/{name}/high": high}
        rows.append(row | {
            "gpu_hours": run.gpu_hours, "usd": run.usd, "seconds": run.seconds,
            "wandb": run.tracker.get("url") or run.tracker.get("sync"),
            "not_known": "; ".join(run.not_known), "folder": run.folder,
            "command": run.command, "error": run.error,
        })  # fmt: skip
    with written(path) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def group_columns(group: RankingRow) -> dict[str, Any]:
    """The configuration over its seeds, and how it compares with the best one, as columns."""
    low, high = group.interval or (None, None)
    against = group.against
    between = (against and against.interval) or (None, None)
    return {
        "group": group.label, "group_rank": group.rank, "group_seeds": group.seeds,
        "group_value": group.value, "group_low": low, "group_high": high,
        "difference": against and against.value, "difference_low": between[0],
        "difference_high": between[1], "verdict": group.verdict,
    }  # fmt: skip


def write_curves(path: Path, sweep: Collected) -> None:
    """curves.csv: every number of every readable metrics.jsonl: run, step, metric, value."""
    with written(path) as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "metric", "value"])
        for run in sweep.runs:
            lines = metric_lines(run.folder / "metrics.jsonl") if run.curves and run.folder else ()
            for line in lines:
                writer.writerows(
                    (run.name, line["step"], key, value)
                    for key, value in line.items()
                    if key != "step" and (isinstance(value, float) or number(value) is not None)
                )
