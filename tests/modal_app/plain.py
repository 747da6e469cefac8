"""A job that says where it is and what it got."""

import os
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="plain")
def main(cfg: DictConfig) -> list[object]:
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "here.txt").write_text(os.getcwd())
    if cfg.size:
        (folder / "large.bin").write_bytes(os.urandom(cfg.size))
    for place in cfg.read:
        print("READ", Path(place).read_text(), flush=True)
    return [cfg.name, len(os.environ.get("PLANTED", "")), os.environ.get("MODAL_LOCAL_GPU")]


if __name__ == "__main__":
    main()
