"""A small real training job: fits a line with torch, saves every step, continues where it was.

It steps by itself, as torch.optim.SGD does with momentum: that module takes a second to load.
"""

import json
import os
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(cfg: DictConfig) -> float:
    import torch  # the launching process does without

    torch.set_num_threads(1)
    folder = Path(cfg.get("folder", "/runs")) / str(cfg.name)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.get("seed", 0))
    model = torch.nn.Linear(4, 1)
    velocity = [torch.zeros_like(weight) for weight in model.parameters()]
    inputs = torch.randn(32, 4)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
    start, loss, saved = 0, torch.tensor(float("nan")), folder / "last.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        velocity = state["velocity"]
        start, loss = state["step"], state["loss"]
    for step in range(start, cfg.get("steps", 5)):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight, speed in zip(model.parameters(), velocity, strict=True):
                weight.sub_(speed.mul_(0.9).add_(weight.grad), alpha=0.1)
        print(f"STEP {cfg.name} {step} {loss.item():.9f}", flush=True)
        if cfg.name == "raises" and step == 2:
            raise ValueError("a job that raises")
        if cfg.name == "exits" and step == 1:
            os._exit(7)
        state = {"step": step + 1, "loss": loss.detach(), "model": model.state_dict()}
        state["velocity"] = velocity
        torch.save(state, folder / "partial.pt")
        os.replace(folder / "partial.pt", saved)
        with open(folder / "progress.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
        time.sleep(cfg.get("pause", 0.0))
    (Path(HydraConfig.get().runtime.output_dir) / "weights.txt").write_text(str(model.weight))
    return float("nan") if cfg.name == "notanumber" else loss.item()


if __name__ == "__main__":
    main()
