"""What the runs of a sweep left: settings, evaluations, curves, benchmarks, cost.

Nothing here needs to be whole: a sweep may still run, a file may be cut off or damaged. What cannot
be read, or is not what was written, is left out; `Collected.problems` and the run's `not_known` say
why.
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from specforge_exp.artifacts import content_of, read_object
from specforge_exp.bench.published import Beside, beside
from specforge_exp.errors import InputError
from specforge_exp.records import metric_lines, unsealed
from specforge_exp.report.measured import way_of
from specforge_exp.report.origin import record_of, run_folder, strange_bench
from specforge_exp.report.record import (
    FILE,
    directions,
    number,
    numbers,
    read_sweep,
    returned_values,
)
from specforge_exp.report.statistics import StratifiedSample, stratum

SHOWN = re.compile(r"(eval/)?(loss|simulated_length|alpha/\d+)")
"""Metrics that the page draws over steps."""
NOT_CHOSEN = {"run_dir", "run_name", "usd_per_hour", "gpus"}
"""Keys of a run's record that describe where and on what it ran, not what was tried."""
NOT_TRIED = re.compile(r"seeds|run_name|sweep(_name)?|lr_point|(report|tracker|resources)([./].*)?")
"""Overrides that change no number, or only say where others come from."""
LOWER_IS_BETTER = re.compile(
    r"loss(_low|_high)?|nll|perplexity|(hard_)?ce|(reverse_)?kl|hinge|tv|lk_\w+|gpu_hours|usd|cost|"
    r"seconds|hours|.*_mb|.*memory.*|data_wait"
)
ACCEPTED = "accepted_length"


@dataclass(frozen=True)
class Curve:
    """A metric over optimiser steps, in order."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class DataSet:
    """What bench measured on one data set."""

    value: float
    """Accepted length: mean over prompts of tokens per verification."""
    interval: tuple[float, float] | None
    """Its 95 % interval; None: not known."""
    prompts: int
    gained: tuple[int, ...] = ()
    """How many verifications gained 1, 2, ... tokens."""


@dataclass
class SweepRun:
    """One run of a sweep."""

    number: int
    name: str
    label: str
    """`name` without what all runs of the sweep have in common at its beginning."""
    status: str
    """planned, running, completed, failed or pruned."""
    error: str | None
    command: str
    choices: dict[str, Any]
    """What was tried: loss, lr, seed, and whatever else was recorded, overridden or sampled."""
    params: list[str]
    """The keys of `choices` that a study sampled."""
    returned: dict[str, float]
    """What the run returned, by objective."""
    makers: str = ""
    """The code and packages that trained it; empty: not known."""
    gpus: int = 1
    usd_per_hour: float | None = None
    """Of the whole machine; None: unknown."""
    folder: Path | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    final: bool = False
    """Whether `evaluation` is the last one of a finished run."""
    step: int | None = None
    """Newest optimiser step that is known."""
    seconds: float | None = None
    """Seconds of training, over all attempts."""
    curves: dict[str, Curve] = field(default_factory=dict)
    samples: dict[str, StratifiedSample] = field(default_factory=dict)
    """What intervals of a metric are made from; simulated_length (of a causal model loss) and
    accepted_length at most."""
    datasets: dict[str, DataSet] = field(default_factory=dict)
    measured: str = ""
    """How bench measured accepted_length; numbers measured otherwise are no comparison."""
    held_out: str = ""
    """Which conversations its evaluations are of; numbers of others are no comparison."""
    published: list[Beside] = field(default_factory=list)
    """Other people's figures of the setting that bench measured last."""
    not_known: list[str] = field(default_factory=list)
    """What lies under its name and is not shown, for it is not its own: where, and why."""
    tracker: dict[str, str] = field(default_factory=dict)
    """`url` of the run at W&B, or the command that uploads it as `sync`; else empty."""

    @property
    def loss(self) -> str:
        """Name of the loss; empty where the runs have none."""
        return str(self.choices.get("loss", ""))

    @property
    def gpu_hours(self) -> float | None:
        """GPUs times hours of training."""
        return None if self.seconds is None else self.gpus * self.seconds / 3600

    @property
    def usd(self) -> float | None:
        """Price of the machine for the time of training."""
        if self.seconds is None or self.usd_per_hour is None:
            return None
        return self.seconds * self.usd_per_hour / 3600

    def metric(self, name: str) -> float | None:
        """A metric by the name that `report.metric` uses; None: not known (yet)."""
        value = self.evaluation.get(name, self.returned.get(name))
        return self.gpu_hours if value is None and name == "gpu_hours" else value


@dataclass
class Collected:
    """A sweep and its runs."""

    folder: Path
    name: str
    script: str
    kind: str
    """grid or study."""
    state: str
    """running, complete or interrupted."""
    command: str
    started: str
    updated: str
    directions: dict[str, str]
    """minimize or maximize, by objective, in the order in which runs return them."""
    study: dict[str, Any]
    runs: list[SweepRun]
    problems: list[str]
    """What could not be read, one line each."""

    @property
    def states(self) -> dict[str, int]:
        """How many runs have which status, in the order in which a run has them."""
        statuses = [run.status for run in self.runs]
        order = ("completed", "running", "planned", "failed", "pruned", *sorted(statuses))
        return {status: statuses.count(status) for status in order if status in statuses}

    def minimised(self, metric: str) -> bool:
        """Whether less of a metric is better: as the sweep says, else by its name."""
        if metric in self.directions:
            return self.directions[metric] == "minimize"
        return LOWER_IS_BETTER.fullmatch(metric.partition("/")[0]) is not None


def collect(sweep_dir: Path) -> Collected:
    """Read sweep.json and what its runs left.

    Raises:
        InputError: sweep.json is missing or cannot be read.
    """
    sweep = read_sweep(sweep_dir)
    file = sweep_dir / FILE
    listed = [run for run in sweep["runs"] if isinstance(run, dict) and run.get("name")]
    missing = len(sweep["runs"]) - len(listed)
    problems = [f"{file}: {missing} runs without a name are left out"] if missing else []
    script = str(sweep.get("script") or "train")
    short = labels([str(run["name"]) for run in listed])
    if all(label.isdigit() for label in short):
        short = [f"trial {label}" for label in short]
    runs = []
    for label, raw in zip(short, listed, strict=True):
        try:
            run = listed_run(raw, label, sweep, script)
            run.folder, strange = run_folder(sweep_dir, sweep, raw)
        except (TypeError, ValueError, AttributeError) as error:
            problems.append(f"{file}: {raw['name']} is damaged and left out: {error}")
            continue
        run.not_known = strange
        if run.folder is not None:
            read_folder(run, run.folder)
        problems += [f"{run.name}: not known: {reason}" for reason in run.not_known]
        runs.append(run)
    resolved = sweep_dir.resolve()
    return Collected(
        folder=sweep_dir,
        name=resolved.parent.name if resolved.name == script else resolved.name,
        script=script,
        kind=str(sweep.get("kind") or "grid"),
        state=str(sweep.get("state") or "unknown"),
        **{name: str(sweep.get(name) or "") for name in ("command", "started", "updated")},
        directions=directions(sweep),
        study=sweep.get("study") or {},
        runs=runs,
        problems=problems,
    )


def labels(names: list[str]) -> list[str]:
    """Names without the beginning that all of them share, cut after an underscore."""
    cut = commonprefix(names).rfind("_") + 1 if len(names) > 1 else 0  # noqa: RUF071 - letters
    short = [name[cut:] for name in names]
    return short if all(short) else names


def listed_run(raw: dict[str, Any], label: str, sweep: dict[str, Any], script: str) -> SweepRun:
    """A run as sweep.json lists it."""
    record = raw.get("record") or {}
    params = raw.get("params") or {}
    overrides = [str(override) for override in raw.get("overrides") or []]
    choices = {key: value for key, value in record.items() if key not in NOT_CHOSEN}
    for override in map(str, raw.get("resolved") or overrides):
        key, _, text = override.lstrip("+~").partition("=")
        if not NOT_TRIED.fullmatch(key):
            choices.setdefault(key, parsed(text))
    command = shlex.join(["python", f"{script}.py", *overrides])
    return SweepRun(
        number=int(raw.get("number", 0)),
        name=str(raw["name"]),
        label=label,
        status=str(raw.get("status") or "planned"),
        error=raw.get("error"),
        command=str(raw.get("command") or command),
        choices=choices | params,
        params=list(params),
        returned=returned_values(sweep, raw),
        gpus=int(number(record.get("gpus")) or 1),
        usd_per_hour=number(record.get("usd_per_hour")),
    )


def parsed(text: str) -> Any:
    """An override's value as a number where it is one."""
    try:
        return orjson.loads(text)
    except ValueError:
        scientific = re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text)
        return float(text) if scientific else text


def read_folder(run: SweepRun, folder: Path) -> None:
    """Add what a run's folder holds; what is left out stands in `not_known`, with the reason."""
    parts: list[tuple[str, Callable[[SweepRun, Any], None]]] = [
        ("metrics.jsonl", add_curves),
        ("run.json", add_record),
        ("evaluation.json", add_conversations),
        *((file.name, add_bench) for file in own_bench(run, folder)),
        ("tracker.json", add_tracker),
    ]
    made = record_of(folder)  # a checkpoint's speaks of its own files, not of these
    written = made.get("files", {}) if "evaluation" in made else {}
    for name, add in parts:
        file = folder / name
        if not file.is_file():
            continue
        try:
            if name in written and content_of(file) != written[name]:
                raise ValueError("it is not what run.json says was written")
            lines = file.suffix == ".jsonl"
            add(run, metric_lines(file) if lines else unsealed(json.loads(file.read_bytes())))
        except (InputError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            plain = isinstance(error, InputError | OSError | ValueError)
            reason = str(error).replace(f"{file}:", "line ") if plain else repr(error)
            run.not_known.append(f"{file} is damaged and left out: {' '.join(reason.split())}")


def own_bench(run: SweepRun, folder: Path) -> list[Path]:
    """The newest measurement of the draft in a run's folder, as the files say, for a copy has other
    times; or the one that the run returned."""
    found, others = list[tuple[str, float, Path]](), []
    for file in folder.glob("bench*.json"):
        try:
            bench = read_object(file)
            reason = strange_bench(folder, bench, run.returned.get(ACCEPTED))
        except InputError as error:
            run.not_known.append(f"{file} is left out: {error}")
            continue
        if reason is None:
            found.append((str(bench.get("finished", "")), file.stat().st_mtime, file))
        else:
            others.append(f"{file}: {reason}")
    if found:
        return [max(found)[-1]]
    run.not_known += sorted(others)
    return []


def add_curves(run: SweepRun, lines: Iterator[dict[str, Any]]) -> None:
    """Curves, seconds and the newest evaluation, from metrics.jsonl."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    seconds, step = 0.0, None
    evaluation: dict[str, float] = {}
    for line in lines:
        step = line["step"]
        seconds += number(line.get("seconds")) or 0.0
        values = numbers(line)
        held_out = {k.removeprefix("eval/"): v for k, v in values.items() if k.startswith("eval/")}
        evaluation = held_out or evaluation
        for key, value in values.items():
            if SHOWN.fullmatch(key):
                both = points.setdefault(key, ([], []))
                both[0].append(step)
                both[1].append(value)
    run.step, run.seconds, run.evaluation = step, seconds or None, evaluation
    run.curves = {
        key: Curve(np.array(steps), np.array(values)) for key, (steps, values) in points.items()
    }


def add_record(run: SweepRun, record: dict[str, Any]) -> None:
    """The last evaluation and what the record of the sweep did not say, from run.json."""
    config = record.get("config") or {}
    for key, value in (("loss", (config.get("loss") or {}).get("name")), ("lr", config.get("lr"))):
        if value is not None:
            run.choices.setdefault(key, value)
    run.makers = " and ".join(map(str, record.get("makers") or []))
    gpus = record.get("processes") or (config.get("trainer") or {}).get("gpus")
    run.gpus = int(gpus or run.gpus) + int(record.get("workers") or 0)
    if evaluation := numbers(record.get("evaluation") or {}):
        last, logged = evaluation.get("loss", 0.0), run.evaluation.get("loss")
        if logged is not None and not math.isclose(last, logged, rel_tol=1e-3):
            run.curves, run.evaluation, run.seconds = {}, {}, None
            reason = f"it ends with a loss of {logged:.4f}, run.json has {last:.4f}"
            run.not_known.append(f"{run.folder}/metrics.jsonl: {reason}")
        run.evaluation |= evaluation
        run.final = True
    if run.seconds is None:
        run.seconds = number(record.get("seconds"))


def add_conversations(run: SweepRun, record: dict[str, Any]) -> None:
    """What the held-out conversations gave, from evaluation.json.

    Raises:
        ValueError: it is not of the evaluation that the run reports.
    """
    name, total, terms = "simulated_length", "length", "slots"
    if "tokens" in record:  # of a causal model
        name, total, terms = "loss", "loss", "tokens"
    held_out = f"held-out conversations {record['held_out']}" if "held_out" in record else ""
    sample = StratifiedSample((stratum("held-out", record[total], record[terms]),), held_out)
    reported = run.evaluation.setdefault(name, sample.estimate)
    if not math.isclose(sample.estimate, reported, rel_tol=1e-3):
        if not run.final:  # a step ahead of metrics.jsonl, or behind
            return
        raise ValueError(
            f"it gives a {name} of {sample.estimate:.4f}, the run reports {reported:.4f}"
        )
    run.samples[name], run.held_out = sample, held_out


def add_bench(run: SweepRun, bench: dict[str, Any]) -> None:
    """Accepted lengths by data set, from what bench measured last."""
    strata = []
    for name, figures in bench["datasets"].items():
        low, high = figures.get("accepted_length_ci95") or (None, None)
        interval = None if low is None or high is None else (low, high)
        value, prompts = float(figures["accepted_length"]), int(figures.get("prompts") or 0)
        run.datasets[str(name)] = DataSet(
            value, interval, prompts, tuple(figures.get("gained") or ())
        )
        lengths = figures.get("lengths")
        if lengths and any(length is not None for length in lengths):
            gained = [length or 0.0 for length in lengths]
            strata.append(stratum(name, gained, [length is not None for length in lengths]))
    run.evaluation[ACCEPTED] = float(bench["average"])
    run.published = beside(bench)
    run.measured = way_of(bench)
    if run.datasets and len(strata) == len(run.datasets):
        run.samples[ACCEPTED] = StratifiedSample(tuple(strata), run.measured)


def add_tracker(run: SweepRun, tracker: dict[str, Any]) -> None:
    """Where the run is at its tracker: an address, or the command that uploads or shows it."""
    url, sync = tracker.get("url"), tracker.get("sync")
    if isinstance(url, str) and url.startswith(("https://", "http://")):
        run.tracker["url"] = url
    elif isinstance(sync, str):
        run.tracker["sync"] = sync
