"""How a Triton kernel becomes an operator of torch: seen by dispatch modes and the profiler, with
shapes on the meta device, where nothing is launched.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema

LIBRARY = Library("specforge_exp", "DEF")


def operator(*changed: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that launches one kernel, under its own name.

    Args:
        changed: its arguments that are written to.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        LIBRARY.define(name + infer_schema(function, mutates_args=changed))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        called: Callable[..., Any] = getattr(torch.ops.specforge_exp, name)
        return called

    return register


def packed(*tensors: Tensor, outer: int = 0) -> None:
    """What kernels take for granted: all dimensions but so many outer ones lie one after the other.

    Raises:
        ValueError: those of a tensor do not.
    """
    for tensor in tensors:
        if tensor.numel() and not tensor[(0,) * outer].is_contiguous():
            raise ValueError(f"a kernel cannot read shape {[*tensor.shape]} by {tensor.stride()}")


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its first argument, a tensor, if there is work for it."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    if first.is_meta or not all(grid):
        return
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[tuple(grid)](*arguments, **options)
