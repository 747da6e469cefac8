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
    """A weight of the same shape that takes no memory; called as each is registered.

    One that takes none already stays itself: where two modules share it they go on to.
    """
    return weight if weight.is_meta else nn.Parameter(weight.to("meta"), weight.requires_grad)


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
    from torch.distributed.fsdp import FSDPModule

    deal(draft, units, device, processes, {"reshard_after_forward": False})
    for unit in units:
        unit.register_forward_pre_hook(make_gradients)
    for unit, following in pairwise(units):
        assert isinstance(unit, FSDPModule) and isinstance(following, FSDPModule)
        unit.set_modules_to_forward_prefetch([following])


def shard_model(
    model: nn.Module,
    units: Sequence[nn.Module],
    device: torch.device,
    processes: int,
    dtype: torch.dtype,
) -> None:
    """As `shard_draft`, for a model that is large beside what it is given: a unit's weights are let
    go after its forward and its backward, and travel and multiply in `dtype`; gradients are added
    up in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    options = {"mp_policy": policy} if dtype != torch.float32 else {}
    deal(model, units, device, processes, {"reshard_after_forward": True, **options})


def deal(
    whole: nn.Module,
    units: Sequence[nn.Module],
    device: torch.device,
    processes: int,
    options: dict[str, Any],
) -> None:
    """Make FSDP2 units and give each process its share of the first one's weights.

    Weights that stand at two places stay one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = init_device_mesh(device.type, (processes,))
    weights = [*whole.parameters()]  # held, so that no new one gets an old one's id
    values = {name: weight.detach() for name, weight in whole.named_parameters()}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in whole.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            places.setdefault(id(weight), []).append((module, name))
            first, own = places[id(weight)][0]
            new = numberless(module, name, weight) if first is module else getattr(first, own)
            setattr(module, name, new)
    del weights
    for module in (*units, whole):
        fully_shard(module, mesh=mesh, **options)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    own_values = whole.state_dict()
    for name, weight in whole.named_parameters():
        assert isinstance(weight, DTensor)
        value = values.pop(name)
        value = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
        own_values[name] = distribute_tensor(value, mesh, weight.placements)
    whole.load_state_dict(own_values, assign=True)
    for (first, own), *others in places.values():
        for module, name in others:
            setattr(module, name, getattr(first, own))


def save_shared_once(module: nn.Module) -> None:
    """Leave weights that stand at two places out of `state_dict` but for the first of them, and do
    without the others when one is loaded."""
    seen: set[int] = set()
    again: list[str] = []
    for name, weight in module.named_parameters(remove_duplicate=False):
        if id(weight) in seen:
            again.append(name)
        seen.add(id(weight))
    ends = tuple(again)

    def leave_out(_module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in again:
            state.pop(prefix + name, None)

    def do_without(_module: Any, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(ends)]

    module.register_state_dict_post_hook(leave_out)
    module.register_load_state_dict_post_hook(do_without)


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
