"""Makespan of a study whose jobs take unequally long, beside hydra-optuna-sweeper.

    python benchmarks/stragglers.py --json

Both sweepers are the real ones; only their launcher has a virtual clock. `launch` of a batch takes
as long as its slowest job, which is what the stock sweeper waits for; a session ends one job after
the other. Trial n takes as long in both.
"""

import argparse
import contextlib
import copy
import heapq
import io
import json
import logging
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

SIGMA = 0.6
OPTIONS = {
    "optuna": ["hydra.sweeper.max_failure_rate=1.0"],
    "optuna_async": ["+hydra.sweeper.storage._target_=optuna.storages.InMemoryStorage"],
}


@dataclass
class Simulated:
    """A launcher, and its session, that take no time: `now` says how long they would have taken."""

    seconds: Sequence[float]
    """By job number."""
    now: float = 0.0
    running: list[tuple[float, int, JobReturn]] = field(default_factory=list)
    """A heap by the time of the end."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Run a batch."""
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        self.now += max(self.seconds[number] for number in numbers)
        return [returned(overrides) for overrides in job_overrides]

    def session(self, total: int) -> "Simulated":
        """Keep jobs in flight."""
        return self

    def start(self, number: int, overrides: Sequence[str]) -> None:
        """Begin a job now."""
        end = self.now + self.seconds[number]
        heapq.heappush(self.running, (end, number, returned(overrides)))

    def ended(self, seconds: float) -> list[tuple[int, JobReturn]]:
        """Go on to the next end."""
        self.now, number, result = heapq.heappop(self.running)
        return [(number, result)]

    def reports(self) -> dict[int, list[dict[str, Any]]]:
        """No progress."""
        return {}

    def stop(self, number: int) -> None:
        """Nothing is pruned."""

    def close(self) -> None:
        """Nothing is left."""


@dataclass
class QuickLoader:
    """A configuration loader that copies where Hydra composes anew, 80 ms each."""

    real: Any

    def load_sweep_config(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        """The configuration of a job."""
        config = copy.deepcopy(master)
        OmegaConf.update(config, "x", x_of(overrides))
        return config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def x_of(overrides: Sequence[str]) -> float:
    """What was sampled."""
    [x] = [float(each[2:]) for each in overrides if each.startswith("x=")]
    return x


def returned(overrides: Sequence[str]) -> JobReturn:
    """A job's end: how far x is from 3."""
    value = (x_of(overrides) - 3) ** 2
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)


def makespan(sweeper: str, seconds: Sequence[float], workers: int, folder: Path) -> float:
    """Run one study of `len(seconds)` trials; returns its virtual seconds."""
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="stragglers", node={"x": 0.0})
    hydra = Hydra.create_main_hydra2("stragglers", create_config_search_path(None))
    config = hydra.compose_config(
        config_name="stragglers",
        overrides=[
            f"hydra/sweeper={sweeper}",
            f"hydra.sweep.dir={folder}",
            f"hydra.sweeper.n_trials={len(seconds)}",
            f"hydra.sweeper.n_jobs={workers}",
            "hydra.sweeper.sampler.seed=0",
            "x=interval(0.0,6.0)",
            *OPTIONS[sweeper],
        ],
        run_mode=RunMode.MULTIRUN,
        with_log_configuration=False,
    )
    loader: Any = QuickLoader(hydra.config_loader)
    plugin: Any = Plugins.instance().instantiate_sweeper(
        hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks()),
        task_function=lambda cfg: None,
        config=config,
    )
    launcher = Simulated(seconds)
    getattr(plugin, "sweeper", plugin).launcher = launcher  # the stock one hides its own inside
    folder.mkdir(parents=True, exist_ok=True)
    plugin.sweep(list(config.hydra.overrides.task))
    return launcher.now


def compare(seeds: int, trials: int, workers: int) -> dict[str, Any]:
    """Medians over `seeds` draws of the jobs' durations."""
    found: dict[str, list[float]] = {sweeper: [] for sweeper in OPTIONS}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        logging.getLogger().setLevel(logging.WARNING)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        for seed in range(seeds):
            draw = random.Random(seed)
            seconds = [draw.lognormvariate(0.0, SIGMA) for _ in range(trials)]
            for sweeper, spans in found.items():
                spans.append(makespan(sweeper, seconds, workers, Path(folder, sweeper, str(seed))))
    ratios = [ours / stock for stock, ours in zip(*found.values(), strict=True)]
    said = {f"{sweeper}_makespan": statistics.median(spans) for sweeper, spans in found.items()}
    return {
        "seeds": seeds, "trials": trials, "workers": workers, "sigma": SIGMA,
        **{key: round(value, 4) for key, value in said.items()},
        "ratio": round(statistics.median(ratios), 4),
        "worst_ratio": round(max(ratios), 4),
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="the last line is JSON")
    options = parser.parse_args()
    found = compare(options.seeds, options.trials, options.workers)
    print(f"{found['trials']} trials, {found['workers']} workers, {found['seeds']} seeds, "
          f"durations lognormal with sigma {SIGMA} and median 1: median makespan "
          f"{found['optuna_makespan']:.2f} (hydra-optuna-sweeper 1.3.0), "
          f"{found['optuna_async_makespan']:.2f} (optuna_async); "
          f"median ratio {found['ratio']:.2f}, worst {found['worst_ratio']:.2f}")  # fmt: skip
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
