"""A job that says what it got and returns what it is asked for."""

import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="values")
def main(cfg: DictConfig) -> Any:
    print("GOT", OmegaConf.to_container(cfg, resolve=True)["x"], flush=True)
    (Path(HydraConfig.get().runtime.output_dir) / "large.bin").write_bytes(bytes(cfg.size))
    while cfg.hold and Path(cfg.hold).exists():
        time.sleep(0.02)
    if cfg.ret == "x":
        return str(cfg.x)
    if cfg.ret == "generator":
        return (number for number in range(3))
    if cfg.ret == "tensor":
        import torch

        return torch.tensor(1.5)
    import numpy as np

    if cfg.ret == "pair":
        return np.float64(1.5), np.int64(2)
    return {"float64": np.float64(1.5), "float32": np.float32(1.5), "not": np.float32("nan")}[
        cfg.ret
    ]


if __name__ == "__main__":
    main()
