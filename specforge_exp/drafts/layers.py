"""Layers that save little for the backward pass and add weight gradients straight into `.grad`.

A weight is used once per unroll step, so a gradient tensor per use would be written, read and
thrown away again; here each use adds its product to the one that exists. Norms and activations are
computed again from their inputs instead of being kept. Weights may be wider than the data (fp32
weights, bfloat16 data): products run in the data's dtype and are added in the weight's. Within
`narrowed_once` a weight is brought to the data's dtype once, for all its uses and their backward
passes; elsewhere in each use.

Because of that `torch.autograd.grad` does not see these weights; `loss.backward()` does. Weights
are kept on the context as they are: what is saved for the backward pass comes back from activation
checkpointing as a detached copy.

Shape suffixes: R rows, X any dimensions, I inputs, O outputs, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from specforge_exp.sharding import gradient_of

Copies = dict[tuple[Any, ...], tuple[tuple[Tensor, ...], Tensor]]
"""Weights and narrow copies of them, by their ids and columns."""
COPIES: ContextVar[Copies | None] = ContextVar("COPIES", default=None)
IN_ORDER = {"cpu": True, "cuda": False}
"""Whether sums keep the order of the formulas: a CPU's numbers stay the same to the bit. Elsewhere
a step is as few kernels as possible."""


@contextmanager
def narrowed_once() -> Iterator[None]:
    """Layers called within share one narrow copy of each weight, which lives as long as their
    graph. The weights must not change before its backward pass."""
    token = COPIES.set({})
    try:
        yield
    finally:
        COPIES.reset(token)


class Group(NamedTuple):
    """Weights that read the same, and which of them, of which columns, a product takes."""

    weights: tuple[Tensor, ...]
    columns: slice = slice(None)
    which: slice = slice(None)

    @property
    def chosen(self) -> tuple[Tensor, ...]:
        """Those that are taken."""
        return self.weights[self.which]


def narrow(group: Group, dtype: torch.dtype, copies: Copies | None) -> list[Tensor]:
    """The weights of a product in the dtype of the data; those that have to be copied are one
    matrix, part of a copy of the whole group."""
    weights, columns = group.weights, group.columns
    if all(weight.dtype == dtype for weight in weights):
        return [weight[:, columns] for weight in group.chosen]
    copies = {} if copies is None else copies
    key = (columns.start, columns.stop, *map(id, weights))
    if key not in copies:
        parts = [weight.detach()[:, columns] for weight in weights]
        out = parts[0].new_empty(sum(sizes(parts)), parts[0].shape[1], dtype=dtype)
        copies[key] = (weights, torch.cat(parts, out=out))
    first = sum(sizes(weights[: group.which.start or 0]))
    return [copies[key][1][first : first + sum(sizes(group.chosen))]]


def sizes(parts: Sequence[Tensor]) -> list[int]:
    """Rows of each."""
    return [len(part) for part in parts]


def times(x_RI: Tensor, parts: list[Tensor]) -> Tensor:
    """x W^T for each of `narrow`'s matrices, side by side."""
    if len(parts) == 1:
        return x_RI @ parts[0].T
    out_RO = x_RI.new_empty(len(x_RI), sum(sizes(parts)))
    for part, out in zip(parts, out_RO.split(sizes(parts), 1), strict=True):
        torch.mm(x_RI, part.T, out=out)
    return out_RO


def times_back(outer_RO: Tensor, parts: list[Tensor]) -> Tensor:
    """Gradient of x from that of `times`."""
    first, *rest = outer_RO.split(sizes(parts), 1)
    back_RI: Tensor = first @ parts[0]
    for part, outer in zip(parts[1:], rest, strict=True):
        back_RI.addmm_(outer, part)
    return back_RI


Parts = tuple[Tensor, Tensor]
"""What `unit_rms` gives."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, unit: Tensor | None = None) -> Tensor:
        """Keeps shape and dtype; `unit` where that of `unit_rms` is known."""
        return product(unit_rms(x, self.eps)[0] if unit is None else unit, self.weight, x.dtype)

    def backward(self, x_RI: Tensor, gradient_RI: Tensor, parts: Parts | None = None) -> Tensor:
        """Gradient of the input; the weight's is added to its `.grad`."""
        back_RI, own_I = rms_backward(x_RI, self.weight, self.eps, gradient_RI, parts)
        if self.weight.requires_grad:
            gradient_of(self.weight).add_(own_I)
        return back_RI


def product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x y, multiplied as it is and written in another dtype by the same kernel."""
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return (x * y).to(dtype)
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return torch.mul(x, y, out=torch.empty(shape, dtype=dtype, device=x.device))


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) [..., 1]; fp32."""
    if IN_ORDER[x.device.type]:
        return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsub(norm.square(), eps, alpha=-1 / x.shape[-1]).rsqrt()


def unit_rms(x: Tensor, eps: float) -> Parts:
    """x divided by its root mean square, and 1 / that; fp32."""
    scale = rms_scale(x, eps)
    return x * scale, scale


def rms_backward(
    x_XI: Tensor, weight_I: Tensor, eps: float, gradient_XI: Tensor, parts: Parts | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x / rms(x) * weight: of x in its dtype, of the weight in fp32.

    `parts` where `unit_rms` of x is known; the first is written over.
    """
    unit_XI, scale_X1 = unit_rms(x_XI, eps) if parts is None else parts
    each_XI = gradient_XI * unit_XI
    own_I = each_XI.flatten(0, -2).sum(0)
    weight_I = weight_I.float()
    wide_XI = gradient_XI * weight_I
    if IN_ORDER[x_XI.device.type]:
        inner_X1 = torch.mul(wide_XI, unit_XI, out=each_XI).mean(-1, keepdim=True)
        wide_XI.sub_(unit_XI.mul_(inner_X1))
    else:
        wide_XI.addcmul_(unit_XI, (each_XI @ weight_I)[..., None], value=-1 / len(weight_I))
    return product(wide_XI, scale_X1, x_XI.dtype), own_I


def silu_parts(gate_XI: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(gate) and silu(gate)."""
    sigmoid_XI = torch.sigmoid(gate_XI)
    return sigmoid_XI, gate_XI * sigmoid_XI


def swiglu_backward(
    sigmoid_XI: Tensor, silu_XI: Tensor, up_XI: Tensor, inner_XI: Tensor, out: Any = (None, None)
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, in `out`; that of silu(gate) * up, `inner_XI`, is written over."""
    up_back_XI = torch.mul(inner_XI, silu_XI, out=out[1])
    # silu' = sigmoid + silu - silu * sigmoid
    slope_XI = torch.addcmul(sigmoid_XI + silu_XI, silu_XI, sigmoid_XI, value=-1)
    return torch.mul(inner_XI.mul_(up_XI), slope_XI, out=out[0]), up_back_XI


def add_product(weight_OI: Tensor, columns: slice, outer_RO: Tensor, x_RI: Tensor) -> None:
    """Add outer^T x to those columns of the weight's gradient."""
    add_products(Group((weight_OI,), columns), outer_RO, x_RI)


def add_products(group: Group, outer_RO: Tensor, x_RI: Tensor) -> None:
    """Add outer^T x, part by part, to the gradients of the group's weights."""
    weights, columns = group.chosen, group.columns
    wanted = [weight.requires_grad for weight in weights]
    if not any(wanted):
        return
    gradients = [gradient_of(w)[:, columns] if w.requires_grad else None for w in weights]
    outers = outer_RO.split(sizes(weights), 1)
    if all(g is None or g.dtype == x_RI.dtype for g in gradients):
        for gradient, outer in zip(gradients, outers, strict=True):
            if gradient is not None:
                gradient.addmm_(outer.T, x_RI)
        return
    parts = (outer_RO.T @ x_RI).split(sizes(weights))
    for gradient, part in zip(gradients, parts, strict=True):
        if gradient is not None:
            gradient.add_(part)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, group: Group, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI)
        ctx.group, ctx.copies = group, COPIES.get()
        return times(x_RI, narrow(group, x_RI.dtype, ctx.copies))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (x_RI,), group = ctx.saved_tensors, ctx.group
        add_products(group, outer[0], x_RI)
        back_RI = None
        if ctx.needs_input_grad[0]:
            back_RI = times_back(outer[0], narrow(group, x_RI.dtype, ctx.copies))
        return back_RI, None, *(None,) * len(group.weights)


def linear(x_RI: Tensor, *weights: Tensor, which: slice = slice(None)) -> Tensor:
    """x W^T for each of a group's weights that is taken, side by side, in x's dtype: [R, O]."""
    out: Tensor = _Linear.apply(x_RI, Group(weights, which=which), *weights)
    return out


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, ids_X: Tensor, weight_VI: Tensor) -> Tensor:
        ctx.save_for_backward(ids_X)
        ctx.weight = weight_VI
        return F.embedding(ids_X, weight_VI)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None]:
        (ids_X,), weight_VI = ctx.saved_tensors, ctx.weight
        if weight_VI.requires_grad:
            rows_RI = outer[0].flatten(0, -2).to(weight_VI.dtype)
            gradient_VI, ids_R = gradient_of(weight_VI), ids_X.flatten()
            # Of the two, the one that always adds in the same order: a run is repeated to the bit.
            if ids_R.device.type == "cpu":
                gradient_VI.index_add_(0, ids_R, rows_RI)
            else:
                gradient_VI.index_put_((ids_R,), rows_RI, accumulate=True)
        return None, None


def embedding(ids_X: Tensor, weight_VI: Tensor) -> Tensor:
    """Rows of a learnt weight, [..., I] in its dtype; no gradient of its size is made."""
    out: Tensor = _Embedding.apply(ids_X, weight_VI)
    return out


class _NormLinear(Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, norm: RMSNorm, group: Group, *weights: Tensor) -> Tensor:
        unit_RI, scale_R1 = unit_rms(x_RI, norm.eps)
        ctx.save_for_backward(x_RI, scale_R1)
        ctx.norm, ctx.group, ctx.copies = norm, group, COPIES.get()
        return times(norm(x_RI, unit_RI), narrow(group, x_RI.dtype, ctx.copies))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (x_RI, scale_R1), group = ctx.saved_tensors, ctx.group
        unit_RI = x_RI * scale_R1
        add_products(group, outer[0], ctx.norm(x_RI, unit_RI))
        back_RI = times_back(outer[0], narrow(group, x_RI.dtype, ctx.copies))
        back_RI = ctx.norm.backward(x_RI, back_RI, (unit_RI, scale_R1))
        back = back_RI if ctx.needs_input_grad[0] else None
        return back, None, None, *(None,) * len(group.weights)


def norm_linear(
    x_RI: Tensor,
    norm: RMSNorm,
    columns: slice,
    *weights: Tensor,
    which: slice = slice(None),
) -> Tensor:
    """norm(x) W[:, columns]^T for each of a group's weights that is taken, side by side; keeps x
    only."""
    out: Tensor = _NormLinear.apply(x_RI, norm, Group(weights, columns, which), *weights)
    return out


class _Normed(Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, norm: RMSNorm, weight_I: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI)
        ctx.norm = norm
        out_RI: Tensor = norm(x_RI)
        return out_RI

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None]:
        gradient_RI = ctx.norm.backward(*ctx.saved_tensors, outer[0])
        return gradient_RI if ctx.needs_input_grad[0] else None, None, None


def normed(x_RI: Tensor, norm: RMSNorm) -> Tensor:
    """norm(x); keeps x only. Any shape where there is no gradient."""
    out: Tensor = _Normed.apply(x_RI, norm, norm.weight)
    return out


class _SwigluDown(Function):
    @staticmethod
    def forward(ctx: Any, both_RI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(both_RI)
        ctx.weight, ctx.copies = weight_OI, COPIES.get()
        gate_RI, up_RI = both_RI.chunk(2, 1)
        narrowed = narrow(Group((weight_OI,)), both_RI.dtype, ctx.copies)
        return times(F.silu(gate_RI) * up_RI, narrowed)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (both_RI,), weight_OI = ctx.saved_tensors, ctx.weight
        gate_RI, up_RI = both_RI.chunk(2, 1)
        (narrowed_OI,) = narrow(Group((weight_OI,)), both_RI.dtype, ctx.copies)
        back_RI = torch.empty_like(both_RI)
        if IN_ORDER[both_RI.device.type]:
            parts = silu_parts(gate_RI)
            add_product(weight_OI, slice(None), outer[0], parts[1] * up_RI)
            swiglu_backward(*parts, up_RI, outer[0] @ narrowed_OI, back_RI.chunk(2, 1))
            return back_RI, None
        silu_RI = F.silu(gate_RI)
        add_product(weight_OI, slice(None), outer[0], silu_RI * up_RI)
        inner_RI = outer[0] @ narrowed_OI
        gate_back_RI, up_back_RI = back_RI.chunk(2, 1)
        torch.mul(inner_RI, silu_RI, out=up_back_RI)
        torch.ops.aten.silu_backward(inner_RI.mul_(up_RI), gate_RI, grad_input=gate_back_RI)
        return back_RI, None


def swiglu_down(both_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """(silu(gate) * up) W^T of gate and up side by side; keeps those only."""
    out: Tensor = _SwigluDown.apply(both_RI, weight_OI)
    return out
