"""Weights that processes share: FSDP2 for the draft, and reading what any sharding has split.

torch.distributed's tensors are loaded where they are used: a second of every start otherwise.

Shape suffixes: none; these functions take tensors of any shape.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


def whole(weight: Tensor) -> Tensor:
    """A tensor without gradient, gathered when processes share it; then all of them must ask."""
    from torch.distributed.tensor import DTensor

    full: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return full.detach()


def gradient_of(weight: Tensor) -> Tensor:
    """The weight's `.grad`, made when it is missing."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def as_in(weight: Tensor, value: Tensor) -> Tensor:
    """A whole value, shared among the processes as `weight` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(weight, DTensor):
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements)


def numberless(module: nn.Module, name: str, weight: Tensor) -> Any:
    """A weight of the same shape that takes no memory; called as each is registered."""
    return nn.Parameter(weight.to("meta"), weight.requires_grad)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Modules that are made here have weights on the meta device; their buffers are real."""
    hook = register_module_parameter_registration_hook(numberless)
    try:
        yield
    finally:
        hook.remove()


def shard_draft(
    draft: nn.Module, units: Sequence[nn.Module], device: torch.device, processes: int
) -> None:
    """Share weights, gradients and moments among the processes (FSDP2).

    Each unit, a part that is called as a module, is gathered and its gradients are added up by
    itself, while the one before it works; the rest is one more unit. The first process's weights
    count; the others' may be numberless. They are dealt one by one: besides its share, no process
    has more than one of them, the first on the CPU all of them, once.

    Gradients are summed, not averaged: one normalisation over the window is in the loss already.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = init_device_mesh(device.type, (processes,))
    values = {name: weight.detach() for name, weight in draft.named_parameters()}
    for module in draft.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, numberless(module, name, weight))
    for module in (*units, draft):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for unit in units:
        unit.register_forward_pre_hook(make_gradients)
    for unit, following in pairwise(units):
        assert isinstance(unit, FSDPModule) and isinstance(following, FSDPModule)
        unit.set_modules_to_forward_prefetch([following])
    own = draft.state_dict()
    for name, weight in draft.named_parameters():
        assert isinstance(weight, DTensor)
        value = values.pop(name)
        value = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
        own[name] = distribute_tensor(value, mesh, weight.placements)
    draft.load_state_dict(own, assign=True)


def make_gradients(module: nn.Module, arguments: Any) -> None:
    """A unit's forward hook: its weights, whole now, get gradients to add to, so that processes add
    up the same tensors, whatever each of them has used."""
    if torch.is_grad_enabled():
        for weight in module.parameters():
            gradient_of(weight)


def is_sharded(draft: nn.Module) -> bool:
    """Whether processes share the draft: then each of them must run as many forwards."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(draft, FSDPModule)
