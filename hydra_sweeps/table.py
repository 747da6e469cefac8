"""What the user reads: the runs of a dry run, and the table at the end."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from hydra_sweeps.jobs import Job
from hydra_sweeps.overrides import without
from hydra_sweeps.record import Run, Sweep, Value


def plan(jobs: Sequence[Job], done: Mapping[int, Run], sweep_dir: Path) -> str:
    """Every run with its overrides, name and folder; the last line is the number of runs.

    Args:
        jobs: all of them.
        done: the records of those that would be skipped, by number.
        sweep_dir: the folder above theirs.
    """
    rows = [("run", "overrides", "name", "folder", "")]
    for job in jobs:
        name = job.subdir
        state = f"(done: {shown(done[job.number].value)})" if job.number in done else ""
        rows.append((f"#{job.number}", job.text, name, str(sweep_dir / name), state))
    return "\n".join([*columns(rows), f"{len(jobs)} runs"])


def table(sweep: Sweep, runs: Sequence[Run], name_key: str | None = None) -> str:
    """Runs as a table, best first by the first objective, and why some have failed."""
    names, choices_by_name = sweep.names, choices(runs, name_key)
    rows = [("rank", "run", "overrides", *names, "status", "time")]
    numbers = [False, False, False, *(True for _ in names), False, True]
    for rank, run in enumerate(ranked(sweep, runs), 1):
        place = str(rank) if run.status == "completed" and first(run.value) is not None else "-"
        values = [shown(value) for value in several(run.value, len(names))]
        seconds = "" if run.seconds is None else str(timedelta(seconds=round(run.seconds)))
        rows.append((place, run.name, choices_by_name[run.name], *values, run.status, seconds))
    lines = columns(rows, numbers)
    lines += [
        f"#{run.number} {run.name} failed: {run.error}" for run in runs if run.status == "failed"
    ]
    return "\n".join(lines)


def ranked(sweep: Sweep, runs: Sequence[Run]) -> list[Run]:
    """Completed runs with a value, best first; then those without; then what did not complete."""
    minimise = bool(sweep.objectives) and sweep.objectives[0]["direction"] == "minimize"

    def place(run: Run) -> tuple[bool, bool, float, int]:
        best = first(run.value)
        worth = 0.0 if best is None else best if minimise else -best
        return run.status != "completed", best is None, worth, run.number

    return sorted(runs, key=place)


def first(value: Value) -> float | None:
    """The first objective."""
    return value[0] if isinstance(value, list) else value


def several(value: Value, count: int) -> list[float | None]:
    """One entry for each of `count` objectives."""
    values = value if isinstance(value, list) else [value]
    return [*values, *[None] * count][:count]


def shown(value: Value) -> str:
    """A value in four digits."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "-" if value is None else f"{value:.4g}"


def choices(runs: Sequence[Run], name_key: str | None) -> dict[str, str]:
    """By name of the run: every override in which the runs differ, but for the one that only names
    it; of a run alone all. The values are those that the jobs got."""
    own = {run.name: without(run.resolved or run.overrides, name_key) for run in runs}
    common = set.intersection(*map(set, own.values())) if len(own) > 1 else set()
    return {name: " ".join(o for o in own[name] if o not in common) for name in own}


def columns(rows: Sequence[Sequence[str]], right: Sequence[bool] | None = None) -> list[str]:
    """Rows as lines, columns aligned; `right` says which of them to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = right or [False] * len(widths)
    return [
        "  ".join(
            cell.rjust(width) if side else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in rows
    ]
