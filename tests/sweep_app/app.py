"""Jobs of every kind that a sweep meets; each notes that it started."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig


def reported(cfg: DictConfig, sweep_dir: Path) -> None:
    """What hydra.sweeper.report calls: tells that it was called, and with what."""
    assert (sweep_dir / "sweep.json").is_file() and "hydra" not in cfg
    if cfg.note == "no report":
        raise ValueError("a report that fails")
    print("REPORTED", sweep_dir.name)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> Any:
    """Return `x`, or what the kind says."""
    folder = Path(cfg.folder)
    with (folder / "starts.txt").open("a") as file:
        file.write(f"{cfg.name}\n")
    kind = cfg.kind.name
    if kind == "waits":
        while not (folder / "go").exists():
            time.sleep(0.02)
    elif kind == "raises":
        raise ValueError("a job that raises\nand says more")
    elif kind == "exits":
        sys.exit(3)
    elif kind == "dies":
        os._exit(9)
    (folder / f"{cfg.name}.txt").write_text(str(cfg.seed))
    special = {"notanumber": float("nan"), "nothing": None, "pair": (cfg.x, 2)}
    if kind == "generates":
        return (item for item in range(3))
    return special.get(kind, cfg.x)


if __name__ == "__main__":
    main()
