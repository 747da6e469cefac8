"""CPU time, wall time and activation memory of a training step, the same way for everybody.

Activation memory is the peak resident size during a step minus the size before it, with parameters
and gradients held: warm up, free what the set-up left, trim the allocator, reset the peak counter.
On CUDA it is the allocator's peak minus what is allocated before the step.

Other work on the machine moves CPU time (caches, page faults), but no count of instructions: under
valgrind's callgrind, which can be switched on for a step alone, `--instructions` counts one.
"""

import argparse
import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peers.counted import instructions


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every step's script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("file", type=Path, help="what inputs.save wrote")
    parser.add_argument("--shape", default="{}", help="inputs.Shape as JSON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", action="store_true", help="wait for a line before every step")
    parser.add_argument("--instructions", type=Path, help="callgrind's output, if it runs this")
    return parser


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def settle() -> None:
    """Give freed memory back, then reset the peak counter."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def wait_for_turn() -> None:
    """Say that a step could begin, and wait until this process is the one that works."""
    print("ready", flush=True)
    sys.stdin.readline()


def measure(step: Callable[[], Any], args: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps; gradients must exist after the first call and be kept.

    Args:
        step: one forward and backward pass.
        args: what `arguments` parsed.

    Returns:
        cpu_s, of it sys_s in the kernel, wall_s, activation_mb, minor_faults (pages of memory that
        the kernel gave) and, with --instructions, these.
    """
    cuda = args.device.startswith("cuda")
    for _ in range(args.warmup):
        step()
    cpu, wall, memory, kernel, faults = [], [], [], [], []
    for _ in range(args.steps):
        if args.turns:
            settle()  # or all that wait hold what their last step has freed
            wait_for_turn()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            settle()
            before = status("VmRSS")
        own = resource.getrusage(resource.RUSAGE_SELF)
        c, t = time.process_time(), time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        cpu.append(time.process_time() - c)
        wall.append(time.perf_counter() - t)
        after = resource.getrusage(resource.RUSAGE_SELF)
        kernel.append(after.ru_stime - own.ru_stime)
        faults.append(after.ru_minflt - own.ru_minflt)
        peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
        memory.append(peak - before)
    counted = {"instructions": instructions(step, args.instructions)} if args.instructions else {}
    return counted | {
        "cpu_s": statistics.median(cpu),
        "sys_s": statistics.median(kernel),
        "minor_faults": statistics.median(faults),
        "wall_s": statistics.median(wall),
        "activation_mb": statistics.median(memory) / 2**20,
    }


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a product of 2048^3, on CUDA of 8192^3, the median of 9."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times[1:])
