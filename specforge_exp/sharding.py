"""Weights that processes share: FSDP2 for the draft, and reading what any sharding has split.

Shape suffixes: none; these functions take tensors of any shape.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(weight: Tensor) -> Tensor:
    """A tensor without gradient, gathered when processes share it; then all of them must ask."""
    full: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return full.detach()


def gradient_of(weight: Tensor) -> Tensor:
    """The weight's `.grad`, made when it is missing."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def as_in(weight: Tensor, value: Tensor) -> Tensor:
    """A whole value, shared among the processes as `weight` is."""
    if not isinstance(weight, DTensor):
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements)


def shard_draft(draft: nn.Module, device: torch.device, processes: int) -> None:
    """Share weights, gradients and moments among the processes (FSDP2, one unit).

    Gradients are summed, not averaged: one normalisation over the window is in the loss already.
    """
    mesh = init_device_mesh(device.type, (processes,))
    fully_shard(draft, mesh=mesh, reshard_after_forward=False)
    assert isinstance(draft, FSDPModule)
    draft.set_gradient_divide_factor(1.0)
    draft.set_force_sum_reduction_for_comms(True)


def is_sharded(draft: nn.Module) -> bool:
    """Whether processes share the draft: then each of them must run as many forwards."""
    return isinstance(draft, FSDPModule)
