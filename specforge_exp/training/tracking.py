"""Metrics: metrics.jsonl always; mirror.py, another process, copies it to a tracker."""

import hashlib
import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specforge_exp.artifacts import disk_errors
from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.records import metric_lines, write_whole
from specforge_exp.training.checkpoint import METRICS, step_folder
from specforge_exp.training.mirror import read_tracker
from specforge_exp.training.objective import Measure
from specforge_exp.training.progress import DRAFTS

log = logging.getLogger(__name__)

CLOSE_SECONDS = 90.0
"""How long the end of a training waits for the tracker to take what it has not taken yet."""
ONLINE_SECONDS = 45.0
"""How long W&B's server may take to answer before the run goes on offline."""


@dataclass
class Tracker:
    """Where one run's metrics go."""

    file: Path
    mirror: "subprocess.Popen[bytes] | None" = None
    """Copies `file` to the tracker; nothing it does or fails to do touches the training."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line; InputError when the disk is full."""
        with disk_errors(self.file), self.file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.mirror is not None and self.mirror.poll() is not None:
            self.stopped(self.mirror.returncode)

    def close(self) -> None:
        """Let the tracker take the rest, for CLOSE_SECONDS at most."""
        if self.mirror is None:
            return
        assert self.mirror.stdin is not None
        try:
            with self.mirror.stdin as pipe:
                pipe.write(b"complete\n")
            code = self.mirror.wait(CLOSE_SECONDS)
        except OSError:  # it is gone
            code = self.mirror.wait()
        except subprocess.TimeoutExpired:
            self.mirror.kill()
            self.mirror.wait()
            return self.give_up(f"did not take everything in {CLOSE_SECONDS:.0f} s")
        if code:
            self.stopped(code)
        self.mirror = None

    def stopped(self, code: int) -> None:
        """Give up a mirror that ended, for the reason that it left."""
        self.give_up(f"stopped ({read_tracker(self.file.parent).get('stopped') or code})")

    def give_up(self, reason: str) -> None:
        """Say why, and what the user can do; the metrics go on in the file."""
        upload = read_tracker(self.file.parent).get("sync")
        hint = f"; upload what it has with: {upload}" if upload else ""
        log.warning("the tracker %s; all metrics are in %s%s", reason, self.file, hint)
        self.mirror = None


def open_tracker(cfg: Config, run_dir: Path, start_step: int) -> Tracker:
    """Open metrics.jsonl at `start_step`, with the lines that its checkpoint holds.

    What a killed run logged afterwards goes; a checkpoint of an older version holds none.
    """
    file, kept = run_dir / METRICS, step_folder(run_dir, start_step) / METRICS
    lines = metric_lines(kept if kept.exists() else file) if start_step > 0 else iter(())
    logged = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start_step)
    with disk_errors(file):
        write_whole(file, logged.encode())
    mirrored = cfg.tracker.name != "none"
    return Tracker(file, start_mirror(cfg, run_dir, start_step) if mirrored else None)


def start_mirror(cfg: Config, run_dir: Path, start_step: int) -> "subprocess.Popen[bytes] | None":
    """Start the process that copies metrics.jsonl; None when it cannot be started.

    A run that starts over has other numbers under the same steps, where it is asked to or has other
    options than one that came to no checkpoint: it is a run of its own at the tracker.

    Raises:
        InputError: the tracker's package is not installed.
    """
    name = cfg.tracker.name
    if find_spec(name) is None:
        raise InputError(
            f"tracker={name} needs {name}: pip install -c constraints.txt 'specforge-exp[{name}]'"
        )
    made_of = hashlib.sha256(json.dumps(asdict(cfg), default=str).encode()).hexdigest()
    other = start_step == 0 and read_tracker(run_dir).get("made_of", made_of) != made_of
    if other or not cfg.trainer.resume:
        (run_dir / f"{name}_id").unlink(missing_ok=True)
    request = {
        "tracker": name,
        "run": {
            "project": cfg.tracker.project,
            "group": cfg.tracker.group,
            "name": cfg.tracker.run_name or cfg.tracker.prefix + cfg.run_name,
            "config": asdict(cfg),
            **({"entity": cfg.tracker.entity} if cfg.tracker.entity else {}),
        },
        "folder": str(run_dir.resolve()),
        "made_of": made_of,
        "argv": sys.argv,
        "trainer": os.getpid(),
        "patience": CLOSE_SECONDS,
        "online_seconds": ONLINE_SECONDS,
    }
    mirror = Path(__file__).with_name("mirror.py")
    try:
        process = subprocess.Popen(
            # -P: this package's modules must not hide others by their names.
            [sys.executable, "-P", str(mirror)],
            stdin=subprocess.PIPE,
            stdout=2,
            start_new_session=True,  # Ctrl-C is for the training
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
        process.stdin.flush()
        return process
    except OSError as error:
        log.warning("tracker=%s cannot be started (%s); metrics go to metrics.jsonl", name, error)
        return None


def best_step(folder: Path, measure: Measure = DRAFTS) -> int | None:
    """The evaluated step that `measure` calls the best, from metrics.jsonl."""
    key, sign = f"eval/{measure.best}", 1 if measure.larger else -1
    lines = [line for line in metric_lines(folder / METRICS) if line.get(key) is not None]
    evaluated = [line for line in lines if math.isfinite(line[key])]
    best = max(evaluated, key=lambda line: sign * line[key], default=None)
    return int(best["step"]) if best else None
