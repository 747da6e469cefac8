"""How fast training is: tokens per second, MFU, memory, and time spent waiting for data.

MFU = needed FLOP / (seconds * peak FLOP per second * processes). Needed FLOP are those of the
products in the draft's forward and backward pass (and of the target, when it runs), nothing for
what is computed twice. The peak is the data sheet's dense bfloat16 figure of a known GPU; elsewhere
it is the measured rate of a square product.
"""

import re
import resource
import sys
import time
from functools import cache

import torch

# NVIDIA's data sheets: H100 SXM and H200 1,979 with sparsity, B200 4,500, A100 624, L40S 733, L4
# 242, RTX 4090 330, each halved; A10 125 without. GH200, H800, A800: as H100 and A100.
PEAK = {
    "H100": 989, "H200": 989, "GH200": 989, "H800": 989, "B200": 2250, "A100": 312,
    "A800": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165,
}  # fmt: skip
"""Dense bfloat16 teraFLOP per second by a word of the GPU's name."""
OTHERS = {"PCIe", "NVL", "D", "Laptop"}
"""Words of GPUs that are slower than their namesakes, but for the A100's."""


def peak_flops(device: torch.device) -> float:
    """FLOP per second that MFU is measured against."""
    if device.type != "cuda":
        return matmul_rate(device, torch.float32, 1024)
    words = {*re.split("[ -]", torch.cuda.get_device_name(device))}
    known = {*PEAK} & words
    if known and (not words & OTHERS or known <= {"A100", "A800"}):
        return PEAK[known.pop()] * 1e12
    return matmul_rate(device, torch.bfloat16, 8192)  # so long that its start is of no account


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP per second of a size^3 product, the best of five."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has held: on its GPU, or resident on a CPU; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
