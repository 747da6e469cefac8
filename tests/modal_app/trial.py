"""A small job of a search: takes steps, says in its progress file how it goes, ends as it is told.

It saves every step, and the next attempt continues where it was.
"""

import json
import os
import signal
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(cfg: DictConfig) -> float | tuple[float, float]:
    folder = Path("/runs") / str(cfg.name)
    folder.mkdir(parents=True, exist_ok=True)
    progress, x = folder / "progress.jsonl", float(cfg.get("x", 1.0))
    taken = len(progress.read_text().splitlines()) if progress.exists() else 0
    act = cfg.get("act", "value")
    for step in range(taken, cfg.get("steps", 4)):
        print(f"STEP {cfg.name} {step} {x}", flush=True)
        with progress.open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / (step + 1), "score": x * step}) + "\n")
        if act == "raises":
            raise ValueError("a trial that raises")
        if act == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(cfg.get("pause", 0.0))
    if act == "pair":
        return x, 2.0
    return float("nan") if act == "notanumber" else x


if __name__ == "__main__":
    main()
