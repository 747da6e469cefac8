"""What a worker does while it computes states, for Perfetto."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def profiled(chosen: list[int], call: int, folder: Path) -> Iterator[None]:
    """Record a call if it is one of those that target.profile names.

    Args:
        chosen: [start, calls], or [].
        call: which of this worker's calls, from 0.
        folder: gets a trace of each.
    """
    if not chosen or not chosen[0] <= call < sum(chosen):
        yield
        return
    with torch.profiler.profile(record_shapes=True) as profiler:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"call-{call:06d}-worker-{os.getpid()}.json.gz"))
