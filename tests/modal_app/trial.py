"""A small job of a search: takes steps, says in its progress file how it goes, ends as it is told.

It saves every step, and the next attempt continues where it was. With a negative x it runs until
somebody stops it.
"""

import json
import os
import signal
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig
from standing import held


@hydra.main(version_base="1.3", config_path="conf", config_name="trial")
def main(cfg: DictConfig) -> float | tuple[float, float]:
    folder = Path("/runs") / cfg.name
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.jsonl"
    taken = len(progress.read_text().splitlines()) if progress.exists() else 0
    for step in range(taken, cfg.steps if cfg.x >= 0 else 1000):
        print(f"STEP {cfg.name} {step} {cfg.x}", flush=True)
        with progress.open("a") as file:
            line = {"step": step, "loss": 1 / (step + 1), "score": cfg.x * step}
            file.write(json.dumps(line) + "\n")
        if cfg.act == "raises":
            raise ValueError("a trial that raises")
        if cfg.act == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(cfg.pause)
        while held(cfg.hold, cfg.name, step + 1):
            time.sleep(0.02)
    if cfg.act == "pair":
        return float(cfg.x), 2.0
    return float("nan") if cfg.act == "notanumber" else float(cfg.x)


if __name__ == "__main__":
    main()
