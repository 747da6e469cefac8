"""Sweeps as their runs leave them, for tests and for pictures: sweep.json and the runs' folders."""

import json
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LOSSES = ("baseline", "rkl-only", "mixed", "full-opd")
RATES = {"baseline": (5e-5, 1e-4, 2e-4), "mixed": (5e-5, 1e-4, 2e-4)}
GAIN = {"baseline": 0.0, "rkl-only": -0.35, "mixed": 0.12, "full-opd": 0.2}


@dataclass
class Plan:
    """What a run shall have tried, and what came of it."""

    name: str
    overrides: list[str]
    record: dict[str, Any]
    tau: float = 3.3
    status: str = "completed"
    error: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    value: Any = None
    points: int = 45
    bench: tuple[str, ...] = ()


@dataclass
class Units:
    """How hard each conversation is; the same for all runs of a sweep."""

    slots: np.ndarray
    hard: np.ndarray


def units(count: int = 60) -> Units:
    generator = np.random.default_rng(1)
    return Units(generator.integers(20, 200, count), generator.normal(0, 0.35, count))


def grid(losses: tuple[str, ...] = LOSSES, seeds: int = 1, **options: Any) -> list[Plan]:
    """Losses times three learning rates, times seeds."""
    plans = []
    for place, loss in enumerate(losses):
        for point, lr in enumerate(RATES.get(loss, (3e-5, 5e-5, 1e-4))):
            for seed in range(seeds):
                name = f"tiny_quickstart_eagle3_{loss}_lr{lr:g}"
                overrides = [f"loss={loss}", f"lr={lr:g}"]
                if seed:  # as the sweeper repeats a run that an earlier command has made
                    name += f"_seed{seed}"
                    overrides += [f"seeds={seeds}", f"seed={seed}", f"run_name={name}"]
                noise = np.random.default_rng((place, point, seed)).normal(0, 0.01)
                tau = 3.25 + GAIN.get(loss, 0.0) + 0.05 * point * (1.2 - point) + noise
                record = {"loss": loss, "lr": lr, "seed": seed}
                plans.append(Plan(name, overrides, record, tau=float(tau), **options))
    return plans


def study(count: int = 30) -> list[Plan]:
    """Trials of a search with pruned, failed and running ones; two parameters and a choice."""
    generator = np.random.default_rng(3)
    plans = []
    for number in range(count):
        lr = float(10 ** generator.uniform(-5, -3))
        beta = float(generator.uniform(0, 0.3))
        loss = LOSSES[number % 2 * 3]
        tau = 3.4 - 0.3 * (math.log10(lr) + 4) ** 2 - (beta - 0.1) ** 2 + GAIN[loss]
        params = {"lr": lr, "loss.beta": beta, "loss": loss}
        status = {7: "failed", 11: "pruned", 12: "pruned", count - 1: "running"}.get(
            number, "completed"
        )
        error = "ValueError: the loss is nan at step 3" if status == "failed" else None
        overrides = [f"{key}={value}" for key, value in params.items()]
        record = {"loss": loss, "lr": lr, "seed": 0}
        plans.append(
            Plan(f"study_{number}", overrides, record, tau, status, error, params,
                 [tau, 0.1 + lr * 500 + 0.1 * beta])
        )  # fmt: skip
    return plans


def write_sweep(checkpoints: Path, plans: list[Plan], **top: Any) -> Path:
    """Write a sweep and its runs' folders below `checkpoints`; returns the sweep's folder."""
    script = top.get("script", "train")
    sweep_dir = checkpoints / "sweeps" / top.pop("name", "tiny_quickstart_eagle3") / script
    sweep_dir.mkdir(parents=True, exist_ok=True)
    known = units(top.pop("conversations", 60))
    runs = []
    for number, plan in enumerate(plans):
        folder = checkpoints / plan.name
        if plan.status not in ("planned",) and plan.points:
            write_run(folder, plan, known, number)
        runs.append(
            {
                "number": number, "name": plan.name, "overrides": plan.overrides,
                "command": shlex.join(["python", f"{script}.py", *plan.overrides]),
                "status": plan.status, "error": plan.error, "params": plan.params,
                "value": plan.value if plan.status == "completed" else None,
                "started": None, "seconds": None, "digest": "0" * 8,
                "record": {"run_dir": str(folder), "run_name": plan.name, **plan.record},
            }
        )  # fmt: skip
    sweep = {
        "version": 1, "kind": "grid", "script": script, "cwd": str(checkpoints),
        "command": f"python {script}.py -m experiment=ablations",
        "objectives": [{"name": "simulated_length", "direction": "maximize"}],
        "started": "2026-11-21T09:12:00+00:00", "updated": "2026-11-21T09:33:10+00:00",
        "state": "complete", "runs": runs, **top,
    }  # fmt: skip
    (sweep_dir / "sweep.json").write_text(json.dumps(sweep))
    return sweep_dir


def write_run(folder: Path, plan: Plan, known: Units, number: int) -> None:
    """metrics.jsonl, and what a finished run has beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(number)
    lines = []
    for index in range(plan.points):
        share = (index + 1) / plan.points
        step, length = 10 * (index + 1), 1 + (plan.tau - 1) * (1 - math.exp(-5 * share))
        noise = generator.normal(0, 0.03)
        alphas = {f"alpha/{k}": alpha(length + noise, k) for k in range(7)}
        loss = 6.5 * math.exp(-4 * share) + 7.5 - length + noise
        lines.append(
            {"step": step, "epoch": index // 20, "lr": plan.record.get("lr", 1e-4), "loss": loss,
             "alpha": alphas["alpha/0"], **alphas, "simulated_length": length + noise,
             "seconds": 2.7}
        )  # fmt: skip
        if (index + 1) % max(1, plan.points // 9) == 0 or index + 1 == plan.points:
            held_out = evaluation(plan.tau if share == 1 else length, loss)
            lines.append({"step": step, **{f"eval/{k}": v for k, v in held_out.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if plan.status != "completed":
        return
    own = generator.normal(0, 0.06, len(known.slots))
    lengths = (plan.tau + known.hard + own) * known.slots
    lengths *= plan.tau * known.slots.sum() / lengths.sum()
    found = {"step": 10 * plan.points, "length": lengths.tolist(), "slots": known.slots.tolist()}
    (folder / "evaluation.json").write_text(json.dumps(found))
    config = {"lr": plan.record.get("lr"), "loss": {"name": plan.record.get("loss")},
              "trainer": {"gpus": 1}, "tracker": {"name": "none"}}  # fmt: skip
    last = evaluation(plan.tau, loss)
    (folder / "run.json").write_text(
        json.dumps({"config": config, "inputs": {}, "evaluation": last})
    )
    if plan.bench:
        write_bench(folder, plan, generator)


def alpha(length: float, step: int) -> float:
    return min(0.99, max(0.0, (1 - 1 / max(1.01, length)) * (1.03 - 0.015 * step)))


def evaluation(length: float, loss: float) -> dict[str, float]:
    alphas = {f"alpha/{k}": alpha(length, k) for k in range(7)}
    return {"loss": loss, "alpha": alphas["alpha/0"], **alphas, "simulated_length": length}


def write_bench(
    folder: Path, plan: Plan, generator: np.random.Generator, prompts: int = 40
) -> None:
    datasets = {}
    for place, name in enumerate(plan.bench):
        hard = np.random.default_rng(place + 10).normal(0.25 * place, 0.5, prompts)
        lengths = np.maximum(1, plan.tau + hard + generator.normal(0, 0.12, prompts)).tolist()
        half = 1.96 * float(np.std(lengths)) / math.sqrt(prompts)
        mean = float(np.mean(lengths))
        datasets[name] = {"prompts": prompts, "accepted_length": mean, "lengths": lengths,
                          "accepted_length_ci95": [mean - half, mean + half]}  # fmt: skip
    average = float(np.mean([found["accepted_length"] for found in datasets.values()]))
    content = {
        "datasets": datasets,
        "average": average,
        "target": "tiny",
        "settings": {
            "chain_length": 5,
            "temperature": 0,
            "max_tokens": 96,
            "average": "conversations",
            "turns": "first",
            "thinking": "model",
        },
        "config": {
            "draft": {"name": "eagle3", "block_size": None},
            "model": {"chat_template_kwargs": {}},
        },
    }
    (folder / "bench.json").write_text(json.dumps(content))
