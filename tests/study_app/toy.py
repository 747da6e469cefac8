"""A job for sweeper tests: tells a journal when it starts and ends, continues where it stopped."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@dataclass
class Config:
    """What a job does."""

    x: float = 1.0
    kind: str = "a"
    beta: float = 0.0
    gamma: float = 0.0
    act: str = "value"
    """value, pair, nans, raise, kill, exit."""
    bad: int = -1
    """The job number that does `act`; the others return a value. -1: all."""
    steps: int = 0
    """Lines of progress.jsonl; before each it waits for <sweep dir>/go, go-<step> or
    go-<job number>-<step>."""
    run_name: str = "toy_x${x}_${kind}"


def register() -> None:
    """Offer the configuration."""
    ConfigStore.instance().store(name="toy", node=Config)


register()


def value_of(cfg: DictConfig) -> float:
    """Best at x=3, beta=0.5."""
    return -((float(cfg.x) - 3) ** 2) - (float(cfg.beta) - 0.5) ** 2


def tell(sweep: Path, line: str) -> None:
    """Add a line to the sweep's journal; whole even among several processes."""
    with (sweep / "journal").open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def toy(cfg: DictConfig) -> Any:
    """Start, take the steps that an earlier process of this job did not, return a value."""
    job = HydraConfig.get()
    number, sweep = int(job.job.num), Path(job.sweep.dir)
    folder = Path(job.runtime.output_dir)
    print(f"job {number} prints \udce4", flush=True)
    tell(sweep, f"start {number} {os.getpid()} {cfg.x} {cfg.kind} {cfg.beta}")
    progress = folder / "progress.jsonl"
    taken = len(progress.read_bytes().splitlines()) if progress.exists() else 0
    for step in range(taken, cfg.steps):
        wait_for_one(sweep / name for name in ("go", f"go-{step}", f"go-{number}-{step}"))
        line = {"step": step + 1, "loss": 1.0, "eval/score": value_of(cfg) * (step + 1) / cfg.steps}
        with progress.open("a") as file:
            file.write(json.dumps(line) + "\n")
    act = cfg.act if cfg.bad in (-1, number) else "value"
    result = acted(act, value_of(cfg))
    tell(sweep, f"end {number} {os.getpid()}")
    return result


def wait_for_one(files: Iterable[Path]) -> None:
    """Wait until one of them is there."""
    deadline, names = time.monotonic() + 600, list(files)
    while not any(name.exists() for name in names):
        if time.monotonic() > deadline:
            raise TimeoutError(f"none of {names} came")
        time.sleep(0.01)


def more(cfg: DictConfig, trial: Any) -> None:
    """A custom_search_space."""
    if trial.params["kind"] == "b":
        trial.suggest_float("gamma", 5.0, 6.0)


def broken(cfg: DictConfig, trial: Any) -> None:
    """A custom_search_space with a mistake."""
    trial.params["nothing"]


def leaves(cfg: DictConfig, trial: Any) -> None:
    """A custom_search_space that ends the process."""
    sys.exit(3)


def acted(act: str, value: float) -> Any:
    """Return, or end as `act` says."""
    if act == "raise":
        raise ValueError("this job\nraises")
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "exit":
        os._exit(7)
    return {"value": value, "nans": float("nan"), "pair": (value, 2.0)}[act]


@hydra.main(version_base="1.3", config_path=None, config_name="toy")
def main(cfg: DictConfig) -> Any:
    """The script."""
    return toy(cfg)


if __name__ == "__main__":
    main()
