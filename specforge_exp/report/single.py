"""Runs that are named themselves, of a sweep or of none: one page for one or several."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from specforge_exp.config.machine import script
from specforge_exp.errors import InputError
from specforge_exp.report.collect import Collected, SweepRun, labels, read_folder
from specforge_exp.report.drawing import Chart, by_loss, colours, new_figure
from specforge_exp.report.origin import MARKS, record_of

MOST = 12
"""Runs whose distributions are drawn, the longest accepted length first."""


def collect_runs(names: list[str], checkpoints: str) -> Collected:
    """What these runs left, as if they were a sweep.

    Args:
        names: of runs below `checkpoints`, or their folders.
        checkpoints: paths.checkpoints.

    Raises:
        InputError: there is no such run; lists those that are there.
    """
    found = [find_run(name, Path(checkpoints)) for name in names]
    folders = list({folder.resolve(): folder for folder in found}.values())  # each run once
    last = [folder.name for folder in folders]
    own = [f.name if last.count(f.name) == 1 else str(f) for f in folders]
    runs = [
        listed(number, *each)
        for number, each in enumerate(zip(folders, own, labels(own), strict=True))
    ]
    together = Path(checkpoints) / "sweeps" / "compared" / "--".join(f.name for f in folders)
    finished = [str(record_of(folder).get("finished", "")) for folder in folders]
    return Collected(
        folder=folders[0] if len(folders) == 1 else together,
        name=", ".join(own),
        script="train",
        kind="grid",
        state="complete" if all(run.final for run in runs) else "running",
        command=f"{script('report')} run={names[0] if len(names) == 1 else names}",
        started=min(finished),
        updated=max(finished),
        directions={},
        study={},
        runs=runs,
        problems=[f"{run.name}: not known: {reason}" for run in runs for reason in run.not_known],
    )


def find_run(name: str, checkpoints: Path) -> Path:
    """The folder of a run."""
    for folder in (Path(name), checkpoints / name):
        if any(any(folder.glob(mark)) for mark in MARKS):
            return folder
    there = sorted({path.parent.name for path in checkpoints.glob("*/metrics.jsonl")})
    raise InputError(
        f"run={name} is no folder of a run, below {checkpoints} or elsewhere; there are: "
        f"{', '.join(there) or 'none'}"
    )


def listed(number: int, folder: Path, name: str, label: str) -> SweepRun:
    """A run by its own records."""
    record = record_of(folder)
    config: dict[str, Any] = record.get("config") or {}
    named = {key: (config.get(key) or {}).get("name") for key in ("model", "data", "draft", "loss")}
    choices = {**named, "lr": config.get("lr"), "run_name": name}  # no two are one row
    run = SweepRun(
        number=number,
        name=name,
        label=label,
        status="completed" if (folder / "run.json").exists() else "running",
        error=None,
        command=str(record.get("command", "")),
        choices={key: value for key, value in choices.items() if value is not None},
        params=[],
        returned={},
        folder=folder,
    )
    read_folder(run, folder)
    return run


def shares(run: SweepRun) -> list[float]:
    """Of all verifications of a run the share that gained 1, 2, ... tokens; [] unknown."""
    counts = [figures.gained for figures in run.datasets.values()]
    sums = [sum(each) for each in zip_longest(*counts, fillvalue=0)] if all(counts) else []
    return [count / sum(sums) for count in sums] if sum(sums) else []


def distribution_chart(runs: list[SweepRun]) -> Chart | None:
    """How many tokens verifications gain, a line per run."""
    measured = sorted((run for run in runs if shares(run)), key=tau, reverse=True)[:MOST]
    if not measured:
        return None
    chart = new_figure(
        320, "tokens gained by a verification", "share of verifications",
        [("run", "@run"), ("share", "$data_y{0.0 %}"), ("at least 3", "@three{0.0 %}"),
         ("at least 5", "@five{0.0 %}")],
    )  # fmt: skip
    for group, colour in by_loss(measured, colours(runs)):
        data = {
            "run": [run.label for run in group],
            "xs": [list(range(1, len(shares(run)) + 1)) for run in group],
            "ys": [shares(run) for run in group],
            "three": [sum(shares(run)[2:]) for run in group],
            "five": [sum(shares(run)[4:]) for run in group],
        }
        chart.multi_line("xs", "ys", source=data, line_width=2, line_alpha=0.7, **colour)
    note = "Of all data sets together: τ is the mean of what is shown here."
    return Chart("distribution", "Tokens gained by a verification", note, chart)


def tau(run: SweepRun) -> float:
    """The mean of a run's distribution."""
    return sum((place + 1) * share for place, share in enumerate(shares(run)))


def distribution_table(runs: list[SweepRun]) -> str:
    """The same in figures, runs side by side; empty where nothing was measured."""
    measured = [run for run in runs if shares(run)]
    if not measured:
        return ""
    longest = max(len(shares(run)) for run in measured)
    parts = {f"{n + 1}": [sum(shares(run)[n : n + 1]) for run in measured] for n in range(longest)}
    for least in (3, 5):
        parts[f"at least {least}"] = [sum(shares(run)[least - 1 :]) for run in measured]
    lines = [["tokens gained", *(run.label for run in measured)], ["---"] * (len(measured) + 1)]
    lines += [[name, *(f"{100 * part:.1f} %" for part in row)] for name, row in parts.items()]
    lines.append(["mean (pooled)", *(f"{tau(run):.3f}" for run in measured)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
