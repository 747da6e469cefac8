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

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from specforge_exp.sharding import gradient_of

Copies = dict[int, tuple[Tensor, Tensor]]
"""Weights and narrow copies of them, by the weights' ids."""
COPIES: ContextVar[Copies | None] = ContextVar("COPIES", default=None)


@contextmanager
def narrowed_once() -> Iterator[None]:
    """Layers called within share one narrow copy of each weight, which lives as long as their
    graph. The weights must not change before its backward pass."""
    token = COPIES.set({})
    try:
        yield
    finally:
        COPIES.reset(token)


def narrow(
    weight: Tensor, dtype: torch.dtype, copies: Copies | None, columns: slice = slice(None)
) -> Tensor:
    """Columns of the weight in the dtype of the data."""
    if copies is None or weight.dtype == dtype:
        return weight[:, columns].to(dtype)
    if id(weight) not in copies:
        copies[id(weight)] = (weight, weight.to(dtype))
    return copies[id(weight)][1][:, columns]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Keeps shape and dtype."""
        return (unit_rms(x, self.eps)[0] * self.weight).to(x.dtype)

    def backward(self, x_RI: Tensor, gradient_RI: Tensor) -> Tensor:
        """Gradient of the input; the weight's is added to its `.grad`."""
        back_RI, own_I = rms_backward(x_RI, self.weight, self.eps, gradient_RI)
        if self.weight.requires_grad:
            gradient_of(self.weight).add_(own_I)
        return back_RI


def unit_rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x divided by its root mean square, and 1 / that; fp32."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * scale, scale


def rms_backward(
    x_XI: Tensor, weight_I: Tensor, eps: float, gradient_XI: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x / rms(x) * weight: of x in its dtype, of the weight in fp32."""
    unit_XI, scale_X1 = unit_rms(x_XI, eps)
    wide_XI = gradient_XI.float()
    own_I = (wide_XI * unit_XI).flatten(0, -2).sum(0)
    wide_XI = wide_XI * weight_I
    inner_X1 = (wide_XI * unit_XI).mean(-1, keepdim=True)
    return wide_XI.sub_(unit_XI.mul_(inner_X1)).mul_(scale_X1).to(x_XI.dtype), own_I


def silu_parts(gate_XI: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(gate) and silu(gate)."""
    sigmoid_XI = torch.sigmoid(gate_XI)
    return sigmoid_XI, gate_XI * sigmoid_XI


def swiglu_backward(
    sigmoid_XI: Tensor, silu_XI: Tensor, up_XI: Tensor, inner_XI: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; that of silu(gate) * up, `inner_XI`, is written over."""
    up_back_XI = inner_XI * silu_XI
    # silu' = sigmoid + silu - silu * sigmoid
    slope_XI = torch.addcmul(sigmoid_XI + silu_XI, silu_XI, sigmoid_XI, value=-1)
    return inner_XI.mul_(up_XI).mul_(slope_XI), up_back_XI


def add_product(weight_OI: Tensor, columns: slice, outer_RO: Tensor, x_RI: Tensor) -> None:
    """Add outer^T x to those columns of the weight's gradient."""
    if not weight_OI.requires_grad:
        return
    gradient_OI = gradient_of(weight_OI)[:, columns]
    if gradient_OI.dtype == x_RI.dtype:
        gradient_OI.addmm_(outer_RO.T, x_RI)
    else:
        gradient_OI.add_(outer_RO.T @ x_RI)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI)
        ctx.weight, ctx.copies = weight_OI, COPIES.get()
        return x_RI @ narrow(weight_OI, x_RI.dtype, ctx.copies).T

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None]:
        (x_RI,), weight_OI = ctx.saved_tensors, ctx.weight
        add_product(weight_OI, slice(None), outer[0], x_RI)
        if not ctx.needs_input_grad[0]:
            return None, None
        return outer[0] @ narrow(weight_OI, x_RI.dtype, ctx.copies), None


def linear(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T, in x's dtype: [R, O]."""
    out: Tensor = _Linear.apply(x_RI, weight_OI)
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
    def forward(
        ctx: Any, x_RI: Tensor, norm: RMSNorm, columns: slice, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_RI)
        ctx.norm, ctx.columns, ctx.weights, ctx.copies = norm, columns, weights, COPIES.get()
        normed_RI = norm(x_RI)
        narrows = (narrow(weight, x_RI.dtype, ctx.copies, columns) for weight in weights)
        return tuple(normed_RI @ weight.T for weight in narrows)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (x_RI,), weights = ctx.saved_tensors, ctx.weights
        normed_RI = ctx.norm(x_RI)
        gradient_RI = torch.zeros_like(normed_RI)
        for weight, outer_RO in zip(weights, outer, strict=True):
            add_product(weight, ctx.columns, outer_RO, normed_RI)
            narrow_OI = narrow(weight, x_RI.dtype, ctx.copies, ctx.columns)
            gradient_RI.addmm_(outer_RO, narrow_OI)
        del normed_RI
        gradient_RI = ctx.norm.backward(x_RI, gradient_RI)
        return gradient_RI if ctx.needs_input_grad[0] else None, None, None, *(None,) * len(weights)


def norm_linear(
    x_RI: Tensor, norm: RMSNorm, columns: slice, *weights: Tensor
) -> tuple[Tensor, ...]:
    """norm(x) W[:, columns]^T for each weight; keeps x only."""
    out: tuple[Tensor, ...] = _NormLinear.apply(x_RI, norm, columns, *weights)
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
    def forward(ctx: Any, gate_RI: Tensor, up_RI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_RI, up_RI)
        ctx.weight, ctx.copies = weight_OI, COPIES.get()
        return (F.silu(gate_RI) * up_RI) @ narrow(weight_OI, gate_RI.dtype, ctx.copies).T

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        (gate_RI, up_RI), weight_OI = ctx.saved_tensors, ctx.weight
        parts = silu_parts(gate_RI)
        add_product(weight_OI, slice(None), outer[0], parts[1] * up_RI)
        inner_RI = outer[0] @ narrow(weight_OI, gate_RI.dtype, ctx.copies)
        return *swiglu_backward(*parts, up_RI, inner_RI), None


def swiglu_down(gate_RI: Tensor, up_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """(silu(gate) * up) W^T; keeps gate and up only."""
    out: Tensor = _SwigluDown.apply(gate_RI, up_RI, weight_OI)
    return out
