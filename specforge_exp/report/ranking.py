"""Which run is best, and whether that is more than chance."""

import json
import re
from dataclasses import dataclass

from specforge_exp.config.machine import script
from specforge_exp.errors import InputError
from specforge_exp.report.collect import ACCEPTED, Collected, SweepRun
from specforge_exp.report.statistics import (
    Comparison,
    Spread,
    averaged,
    compare,
    over_seeds,
    spread,
)
from specforge_exp.report.text import interval_text, measure

BEST, SAME, WORSE, UNKNOWN = "best", "not distinguishable", "worse", "no interval"
OTHERWISE = "measured otherwise"
"""Verdicts on an entry beside the best one; better cannot be."""


@dataclass
class RankingRow:
    """A configuration: one run, or several that differ in their seed only."""

    name: str
    label: str
    runs: list[SweepRun]
    status: str
    """Of its runs: completed when one is, else the furthest any has come."""
    spread: Spread | None = None
    """The metric; None: not known (yet)."""
    rank: int | None = None
    """1 is best; None: not finished."""
    against: Comparison | None = None
    """Beside the best."""
    verdict: str = ""
    """Empty without a rank."""
    seeds: int = 0
    """Finished runs that have the metric."""
    measured: frozenset[str] = frozenset()
    """How those measured it, where that is told."""

    @property
    def value(self) -> float | None:
        """The metric; None: not known (yet)."""
        return None if self.spread is None else self.spread.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % interval, where one is known."""
        return None if self.spread is None else self.spread.interval

    @property
    def loss(self) -> str:
        """Name of its loss."""
        return self.runs[0].loss

    @property
    def finished(self) -> list[SweepRun]:
        """The runs whose metric counts."""
        return [run for run in self.runs if counts(run)]

    def mean(self, metric: str) -> float | None:
        """Mean of a metric over the runs that count, else over those that have it so far."""
        values = [run.metric(metric) for run in self.finished or self.runs]
        measured = [value for value in values if value is not None]
        return sum(measured) / len(measured) if measured else None


@dataclass
class Ranking:
    """Entries, best first, then those without a rank."""

    metric: str
    minimised: bool
    entries: list[RankingRow]

    @property
    def ranked(self) -> list[RankingRow]:
        """Those with a rank, best first."""
        return [entry for entry in self.entries if entry.rank is not None]

    @property
    def several_seeds(self) -> bool:
        """Whether a configuration ran with more than one seed."""
        return any(len(entry.runs) > 1 for entry in self.entries)


def counts(run: SweepRun) -> bool:
    """Whether a run's numbers are final."""
    return run.status == "completed" or (run.status == "running" and run.final)


def spread_of(run: SweepRun, metric: str, resamples: int) -> Spread | None:
    """A metric of one run with its interval, where the run left what one can be made of."""
    if metric in run.samples:
        return spread(run.samples[metric], resamples)
    value = run.metric(metric)
    if value is None:
        return None
    if metric == ACCEPTED:
        estimates = [(d.value, *d.interval) for d in run.datasets.values() if d.interval]
        if estimates and len(estimates) == len(run.datasets):
            return averaged(estimates)
    return Spread(value)


def configurations(runs: list[SweepRun]) -> list[list[SweepRun]]:
    """Runs that differ in their seed only, together, by seed; each seed once."""
    groups: dict[tuple[str, int], list[SweepRun]] = {}
    for run in sorted(runs, key=lambda other: (other.number, other.name)):
        others = {key: value for key, value in run.choices.items() if key != "seed"}
        key = json.dumps(others, sort_keys=True, default=str)
        seed, again = run.choices.get("seed"), 0
        while any(other.choices.get("seed") == seed for other in groups.get((key, again), [])):
            again += 1
        groups.setdefault((key, again), []).append(run)
    return [
        sorted(group, key=lambda run: str(run.choices.get("seed"))) for group in groups.values()
    ]


def rank(sweep: Collected, metric: str, resamples: int, by_seed: bool = False) -> Ranking:
    """Order the sweep's configurations by a metric and compare each with the best.

    Args:
        sweep: what was collected.
        metric: `report.metric`.
        resamples: of each bootstrap.
        by_seed: rank every run by itself.

    Raises:
        InputError: runs have finished, and none of them has this metric.
    """
    metric = metric.removeprefix("eval/")
    check_metric(sweep, metric)
    groups = [[run] for run in sweep.runs] if by_seed else configurations(sweep.runs)
    entries = [entry_of(group, metric, resamples) for group in groups]
    minimised = sweep.minimised(metric)

    def order(entry: RankingRow) -> tuple[bool, bool, float, int]:
        value = (entry.value or 0.0) * (1 if minimised else -1)
        return not entry.finished, entry.spread is None, value, entry.runs[0].number

    entries.sort(key=order)
    ranked = [entry for entry in entries if entry.finished and entry.spread is not None]
    for place, entry in enumerate(ranked, 1):
        assert entry.spread is not None and ranked[0].spread is not None
        entry.rank = place
        entry.against = compare(entry.spread, ranked[0].spread)
        entry.verdict = BEST if place == 1 else verdict(entry, ranked[0])
        if place > 1 and len(entry.measured | ranked[0].measured) > 1:
            entry.verdict = OTHERWISE
    return Ranking(metric, minimised, entries)


def verdict(entry: RankingRow, best: RankingRow) -> str:
    """What the comparison with the best says.

    A paired difference leaves out the noise of training where one of the two has a single seed;
    then it takes intervals that do not overlap as well.
    """
    assert entry.against is not None
    distinguishable = entry.against.distinguishable
    if distinguishable is None:
        return UNKNOWN
    one, other = entry.interval, best.interval
    overlap = one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]
    repeated = entry.seeds > 1 and best.seeds > 1
    return WORSE if distinguishable and (repeated or not overlap) else SAME


def entry_of(runs: list[SweepRun], metric: str, resamples: int) -> RankingRow:
    """A configuration with its metric: over its finished seeds, else how far it has come."""
    label = runs[0].label
    if len(runs) > 1:
        label = re.sub(r"[_-]?seed[-_=]?\d+", "", label) or label
    states = [run.status for run in runs]
    status = next(s for s in ("completed", "running", *states) if s in states)
    entry = RankingRow(runs[0].name, label, runs, status)
    spreads = [(run, spread_of(run, metric, resamples)) for run in entry.finished or runs]
    measured = [spread for _, spread in spreads if spread is not None]
    if measured:
        entry.seeds = len(measured) if entry.finished else 0
        told = {measured_how(run, metric) for run, spread in spreads if spread is not None}
        entry.measured = frozenset(way for way in told if way is not None)
        entry.spread = (
            over_seeds(measured, resamples) if entry.finished else Spread(measured[0].value)
        )
    return entry


def measured_how(run: SweepRun, metric: str) -> str | None:
    """How a run measured a metric; None where that makes no difference, or is not told."""
    if metric == ACCEPTED:
        return run.measured
    return run.held_out or None if metric in run.evaluation else None


def check_metric(sweep: Collected, metric: str) -> None:
    """Refuse a metric that no finished run has."""
    metrics = sorted({name for run in sweep.runs for name in (*run.evaluation, *run.returned)})
    if not metrics or metric in (*metrics, *sweep.directions, "gpu_hours"):
        return
    if metric == ACCEPTED:
        raise InputError(
            f"report.metric={ACCEPTED} comes from bench.json, which no run of {sweep.folder} has; "
            f"{script('bench')} sweep={sweep.folder}"
        )
    shown = [name for name in metrics if "/" not in name or name.endswith("/0")]
    raise InputError(
        f"report.metric={metric} is in no evaluation of {sweep.folder}; there are "
        f"{', '.join(shown)} (and /1, /2 ... of those with /0), and {ACCEPTED} after bench"
    )


def headline(ranking: Ranking) -> list[str]:
    """What can be said of the best, as sentences; the first names it."""
    ranked = ranking.ranked
    if not ranked:
        return [f"No run has finished with a {ranking.metric} yet."]
    best = ranked[0]
    sentence = f"{best.label} is best: {ranking.metric} {measure(best.value)}"
    if between := best.interval:
        sentence += f" (95 % interval {interval_text(between)})"
    lines = [sentence + ".", *otherwise(ranking), *by_other_code(ranking)]
    if len(ranked) == 1:
        return [*lines, "It is the only finished one.", *noise(ranking)]
    same = [entry.label for entry in ranked if entry.verdict == SAME]
    unknown = sum(entry.verdict == UNKNOWN for entry in ranked)
    alike = all(entry.verdict != OTHERWISE for entry in ranked)
    others = len(ranked) - 1
    if unknown == others:
        lines.append("No intervals are known, so nothing can be said about chance.")
        return lines
    if same:
        lines.append(f"Not distinguishable from it: {some(same)} ({len(same)} of {others} others).")
    elif not unknown and alike:
        lines.append(
            "The other is distinguishably worse."
            if others == 1
            else f"All {others} others are distinguishably worse."
        )
    if unknown:
        lines.append(f"{unknown} of {others} others have no interval.")
    return lines + noise(ranking)


def otherwise(ranking: Ranking) -> list[str]:
    """That a metric was not measured alike in all, and in what they differ."""
    ways = sorted({way for entry in ranking.ranked for way in entry.measured})
    if len(ways) < 2:
        return []
    named = " beside ".join(differing(ways))
    again = "bench=standard" if "held-out" in named else "bench.force=true"
    return [
        f"NOT COMPARABLE, measured otherwise: {named}; {script('bench')} sweep=<folder> {again} "
        "measures all alike."
    ]


def by_other_code(ranking: Ranking) -> list[str]:
    """That not all were trained by the same code and packages, and which by which."""
    runs: dict[str, list[str]] = {}
    for run in [run for entry in ranking.ranked for run in entry.runs if run.makers]:
        runs.setdefault(run.makers, []).append(run.label)
    if len(runs) < 2:
        return []
    parts = [f"{some(runs[by])} by {own}" for by, own in zip(runs, differing([*runs]), strict=True)]
    return [f"Not all were trained by the same code and packages: {'; '.join(parts)}."]


def differing(texts: list[str]) -> list[str]:
    """Of lists in words what not all of them have."""
    parts = [text.split(", ") for text in texts]
    own = [[part for part in each if not all(part in text for text in parts)] for each in parts]
    return [", ".join(each) or "no other" for each in own]


def some(labels: list[str]) -> str:
    """The first of them by name."""
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def noise(ranking: Ranking) -> list[str]:
    """What the intervals leave out."""
    if all(entry.seeds < 2 for entry in ranking.ranked):
        return [
            "Training noise is not in the intervals: every configuration was trained with one "
            "seed (a grid repeats each with seeds=3)."
        ]
    few = [entry.label for entry in ranking.ranked if entry.seeds < 2]
    sentences = ["Intervals include the spread between seeds."]
    return sentences + (
        [f"One seed only, without training noise: {', '.join(few)}."] if few else []
    )
