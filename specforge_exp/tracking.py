"""Metrics: metrics.jsonl always, W&B when asked."""

import json
import logging
import os
import secrets
from dataclasses import asdict, dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from specforge_exp.config import Config
from specforge_exp.errors import InputError

log = logging.getLogger(__name__)


@dataclass
class Tracker:
    """Where one run's metrics go."""

    file: Path
    wandb_run: Any = None

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line and pass it on; W&B failing ends W&B, not the run."""
        with self.file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.wandb_run is not None:
            try:
                self.wandb_run.log(metrics, step=metrics["step"])
            except Exception as error:  # whatever it is, training goes on
                log.warning("W&B stopped (%s); metrics go on in %s", error, self.file)
                self.wandb_run = None

    def close(self) -> None:
        """Finish the W&B run."""
        if self.wandb_run is not None:
            self.wandb_run.finish()


def open_tracker(cfg: Config, run_dir: Path, start_step: int) -> Tracker:
    """Open metrics.jsonl at `start_step`: what a killed run logged after its checkpoint goes."""
    file = run_dir / "metrics.jsonl"
    kept = []
    if start_step > 0 and file.exists():
        lines = file.read_text().splitlines(keepends=True)
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start_step
        ]
    partial = file.with_suffix(".jsonl.partial")
    partial.write_text("".join(kept))
    partial.replace(file)
    return Tracker(file, start_wandb(cfg, run_dir) if cfg.tracker.name == "wandb" else None)


def best_step(folder: Path) -> int | None:
    """The evaluated step with the longest simulated accepted length, from metrics.jsonl."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return None
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    evaluated = [line for line in lines if "eval/simulated_length" in line]
    best = max(evaluated, key=lambda line: line["eval/simulated_length"], default=None)
    return int(best["step"]) if best else None


def start_wandb(cfg: Config, run_dir: Path) -> Any:
    """A W&B run that resumes under the same id; offline when no key is found."""
    try:
        import wandb  # half a second, and an extra
    except ImportError:
        raise InputError(
            "tracker=wandb needs wandb: pip install -c constraints.txt 'specforge-exp[wandb]'"
        ) from None
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    run = wandb.init(
        project=cfg.tracker.project,
        group=cfg.tracker.group,
        name=cfg.run_name,
        id=id_file.read_text(),
        resume="allow",
        mode=mode,
        dir=str(run_dir),
        config=asdict(cfg),
    )
    if mode == "offline":
        log.info("W&B is offline; upload later with: wandb sync %s", Path(run.dir).parent)
    return run


def has_wandb_key() -> bool:
    """Whether W&B could log in: WANDB_API_KEY, or ~/.netrc as `wandb login` writes it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError):
        return False
