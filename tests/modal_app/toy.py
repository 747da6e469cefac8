"""A small real training job: fits a line, saves every step, continues where it was.

It descends with momentum, as torch.optim.SGD does, in numpy: torch takes two seconds to load in
every job.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from standing import held


def fit(line: SimpleNamespace, seed: int, steps: int) -> Iterator[float]:
    """Take the steps that are left; the loss before each."""
    inputs = np.random.default_rng(seed).normal(size=(32, 4))
    targets = inputs @ np.array([1.0, -2.0, 3.0, 0.5])
    while line.step < steps:
        error = inputs @ line.weight - targets
        line.loss = float(np.square(error).mean())
        line.velocity = 0.9 * line.velocity + 2 * inputs.T @ error / len(error)
        line.weight = line.weight - 0.03 * line.velocity
        yield line.loss
        line.step += 1


def at(weight: np.ndarray, velocity: np.ndarray, step: int, loss: float) -> SimpleNamespace:
    """What a checkpoint holds. A class of this module would be another one in every launch: it is
    sent by value, and so is not the same to the byte."""
    return SimpleNamespace(weight=weight, velocity=velocity, step=step, loss=loss)


def begun(seed: int) -> SimpleNamespace:
    """Before the first step."""
    return at(np.random.default_rng(seed + 1).normal(size=4), np.zeros(4), 0, float("nan"))


@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(cfg: DictConfig) -> float:
    folder = Path(cfg.get("folder", "/runs")) / str(cfg.name)
    folder.mkdir(parents=True, exist_ok=True)
    line, saved = begun(cfg.get("seed", 0)), folder / "last.npz"
    if saved.exists():
        with np.load(saved) as state:
            step, loss = int(state["step"]), float(state["loss"])
            line = at(state["weight"], state["velocity"], step, loss)
    for loss in fit(line, cfg.get("seed", 0), cfg.get("steps", 5)):
        print(f"STEP {cfg.name} {line.step} {loss:.9f}", flush=True)
        if cfg.name == "raises" and line.step == 2:
            raise ValueError("a job that raises")
        if cfg.name == "exits" and line.step == 1:
            os._exit(7)
        np.savez(folder / "partial.npz", **{**vars(line), "step": line.step + 1})
        os.replace(folder / "partial.npz", saved)
        with open(folder / "progress.jsonl", "a") as file:
            file.write(json.dumps({"step": line.step, "loss": loss}) + "\n")
        time.sleep(cfg.get("pause", 0.0))
        while held(cfg.get("hold"), str(cfg.name), line.step + 1):
            time.sleep(0.02)
    (Path(HydraConfig.get().runtime.output_dir) / "weights.txt").write_text(str(line.weight))
    return float("nan") if cfg.name == "notanumber" else line.loss


if __name__ == "__main__":
    main()
