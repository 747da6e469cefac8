"""A GPU by name alone: tensors that say cuda:0 and lie on the CPU, for what a GPU's kernels are not
needed to see: which operators wait for it, and which are given tensors of two devices.

What PyTorch decides below Python (which kernel, which dtype) it decides as on a CPU.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal",
    "repeat_interleave",
}  # fmt: skip
"""Operators whose result the CPU has to know."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
WAITS: list[str] = []
"""What waited for the GPU, with the line of ours that asked for it."""


def wait(what: str) -> None:
    """Enter it."""
    lines = [f for f in traceback.extract_stack() if "/specforge_exp/" in f.filename]
    ours = [f for f in lines if "/tests/" not in f.filename]
    WAITS.append(f"{what}: {ours[-1].line if ours else ''}")


class There(Tensor):
    """A tensor on it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, requires_grad=here.requires_grad,
        )  # fmt: skip

    def __init__(self, here: Tensor) -> None:
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return GPU

    def numpy(self, *args: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        wait("tolist")
        return self.here.tolist()

    def cpu(self) -> Tensor:
        wait("cpu")
        return self.here.detach().clone()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return self.cpu().to(dtype or self.dtype)
        return self if dtype in (None, self.dtype) else super().to(dtype)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator, with a note where it waits; RuntimeError where a GPU would give one."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there, name = any(isinstance(x, There) for x in tensors), func._schema.name.split("::")[-1]
    asked = kwargs.get("device")
    if name == "_to_copy" and there:  # `There.to` knows whether to another device
        asked = None
    to_gpu = asked is not None and torch.device(asked).type == "cuda"
    if to_gpu and name == "_to_copy" and not kwargs.get("non_blocking"):
        wait("a copy to the GPU")
    elif there and name in READS and kwargs.get("output_size") is None:
        wait(name)
    elif there and name not in ("_to_copy", "copy_"):
        others = [x for x in tensors if not isinstance(x, There) and x.dim()]
        indices = tree_leaves(args[1]) if name in INDEXED else []
        if [x for x in others if not any(x is index for index in indices)]:
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        if others or any(x.dtype == torch.bool for x in indices if x is not None):
            wait(f"{name} by numbers that the CPU has or counts")
    if asked is not None or (name == "_to_copy" and there):
        kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        kwargs |= {} if asked is None else {"device": torch.device("cpu")}
    here = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
    out = func(*here[0], **here[1])
    if not (there or to_gpu) or name in ("_local_scalar_dense", "equal"):
        return out
    out = tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


class Mode(TorchDispatchMode):
    """Also what makes tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def named_gpu(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine that has it; what waits for it from here on."""
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(Tensor, "pin_memory", lambda self: self.clone())
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    WAITS.clear()
    try:
        with Mode():
            yield WAITS
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(before)
