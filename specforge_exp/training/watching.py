"""What one looks at of a training from outside: a profile of some steps, what a step was given.

A step is what happens between two windows, so both stand around their iterator and the loop knows
neither. Off by default; no number depends on them.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specforge_exp.artifacts import Fingerprint, disk_errors
from specforge_exp.config import Config
from specforge_exp.sharding import whole
from specforge_exp.training.batches import Batch
from specforge_exp.training.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """Where a run lives, what it is made of, and who takes part."""

    folder: Path
    fingerprint: Fingerprint
    ranks: Ranks
    makers: list[str] = field(default_factory=list)
    """See `provenance.maker`: of those that have made steps of it, this process's last."""


@dataclass(frozen=True)
class Window:
    """This process's part of one optimiser step."""

    step: int
    epoch: int
    numbers: list[int]
    """The conversations of all processes."""
    batches: list[Batch]
    samples: Sequence[Batch]


def watched(
    cfg: Config, run: TrainingRun, draft: nn.Module, windows: Iterator[Window]
) -> Iterator[Window]:
    """The windows as they come; those of trainer.profile and trainer.dump leave a file."""
    start, count = cfg.trainer.profile or (0, 0)
    profiler = None
    for window in windows:
        if window.step + 1 in cfg.trainer.dump:
            dump(run, draft, window)
        if count and profiler is None and start <= window.step < start + count:
            profiler = torch.profiler.profile(record_shapes=True)
            profiler.start()
        yield window
        if profiler and window.step + 1 >= start + count:
            keep(run, profiler, f"step-{start:06d}")
            profiler, count = None, 0
    if profiler:
        keep(run, profiler, f"step-{start:06d}")


def keep(run: TrainingRun, profiler: torch.profiler.profile, name: str) -> None:
    """Write a trace for chrome://tracing or Perfetto, and say what took longest."""
    profiler.stop()
    path = run.folder / "profile" / f"{name}-rank{run.ranks.rank}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        profiler.export_chrome_trace(str(path))
    if run.ranks.rank == 0:
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        log.info("%s", profiler.key_averages().table(sort_by=order, row_limit=12))
        log.info("train: profile: %s", path)


def dump(run: TrainingRun, draft: nn.Module, window: Window) -> None:
    """Write the weights before a step and what this process trains them on."""
    tensors: dict[str, Tensor] = {"conversations": torch.tensor(window.numbers)}
    for name, weight in draft.named_parameters():
        tensors[f"draft.{name}"] = whole(weight.detach())
    for number, sample in enumerate(window.samples):
        replay = vars(sample).get("replay")
        parts = vars(sample) | (vars(replay) if replay else {})
        tensors |= {f"sample{number}.{n}": v for n, v in parts.items() if isinstance(v, Tensor)}
        tensors[f"sample{number}.lengths"] = torch.tensor(sample.lengths)
    path = run.folder / "dump" / f"step-{window.step + 1:06d}-rank{run.ranks.rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)
    log.info("train: dump: %s", path)
