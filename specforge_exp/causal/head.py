"""Head and cross-entropy in one pass.

Logits exist for some rows at a time, and their gradients with them.

    loss = (sum of -log q(next) + z * log(Z)^2) / divisor,   q = softmax(logits), Z = sum exp

The second term keeps log Z near 0 ("z-loss", PaLM, arXiv 2204.02311). Its gradient in the logits is
q (1 + 2 z log Z) - 1[next]; that of a soft cap or a scale follows by the chain rule.

Shape suffixes: N predicted rows, M rows of a chunk, L rows of a block, H hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from specforge_exp.drafts.head_loss import BLOCK, LOGITS, head_logits


@dataclass(frozen=True)
class Ending:
    """What a model makes of the bare products of its head: softcap * tanh(scale * x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, products: Tensor) -> Tensor:
        """Logits; the products themselves where there is nothing to be made of them."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def backward(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """The gradient in the products, from that in the logits."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale


@dataclass(frozen=True)
class NextToken:
    """What is predicted, and how it counts."""

    labels_N: Tensor
    divisor: Tensor
    """[]; of the sums over the rows."""
    z_loss: float
    ending: Ending


@dataclass(frozen=True)
class RowValues:
    """Of every row, detached; [N] fp32."""

    nll_N: Tensor
    """-log q(next)."""
    squared_N: Tensor
    """log(Z)^2."""
    top1_N: Tensor
    """1 where no other token is more likely than the next one."""


def next_token_loss(
    state_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, wanted: NextToken
) -> tuple[Tensor, RowValues]:
    """The loss over rows, to be differentiated as it is, and values of each row.

    Args:
        state_NH: post-norm states; their dtype is that of the products.
        weight_VH: the head, of any dtype.
        bias_V: its bias.
        wanted: the labels.
    """
    loss, *values = _NextTokenLoss.apply(state_NH, weight_VH, bias_V, wanted)
    return loss, RowValues(*values)


class _NextTokenLoss(Function):
    @staticmethod
    def forward(ctx: Any, state_NH: Tensor, weight_VH: Tensor, bias_V: Any, wanted: Any) -> Any:
        gradients = visit(state_NH, weight_VH, bias_V, wanted, any(ctx.needs_input_grad))
        values, loss = gradients.pop(), gradients.pop()
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        gradients = [None if g is None else g * outer[0] for g in ctx.saved_tensors]
        return *gradients, *[None] * (4 - len(gradients))


@torch.no_grad()
def visit(
    state_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, wanted: NextToken, gradient: bool
) -> list[Any]:
    """Gradients of states, weight and bias (none without `gradient`), the loss, and the values."""
    N, V, device = len(state_NH), len(weight_VH), state_NH.device
    narrow_VH = weight_VH.to(state_NH.dtype)
    size = max(1, LOGITS[device.type] // V)
    buffer_MV = torch.empty(min(size, N), V, device=device)
    values = [torch.zeros(N, device=device) for _ in range(3)]
    state_grad = torch.zeros_like(state_NH)
    weight_grad = torch.zeros(*weight_VH.shape, device=device) if gradient else None
    bias_grad = torch.zeros(V, device=device) if gradient and bias_V is not None else None
    for start in range(0, N, size):
        rows = slice(start, start + size)
        logits_MV = head_logits(state_NH[rows], narrow_VH, buffer_MV)
        if bias_V is not None:
            logits_MV += bias_V
        block = max(1, BLOCK[device.type] // V)
        for first in range(0, len(logits_MV), block):
            part = slice(first, first + block)
            at = slice(start + first, start + first + len(logits_MV[part]))
            for total, value_L in zip(
                values, visit_block(logits_MV[part], wanted, at), strict=True
            ):
                total[at] = value_L
        if weight_grad is not None:
            narrow_MV = logits_MV.to(state_NH.dtype)
            state_grad[rows] = narrow_MV @ narrow_VH
            if narrow_MV.dtype == weight_grad.dtype:
                weight_grad.addmm_(narrow_MV.T, state_NH[rows])
            else:
                weight_grad += narrow_MV.T @ state_NH[rows]
            if bias_grad is not None:
                bias_grad += logits_MV.sum(0)
    summed = values[0].double().sum() + wanted.z_loss * values[1].double().sum()
    loss = (summed / wanted.divisor).float()
    if weight_grad is None:
        return [loss, values]
    gradients = [state_grad, weight_grad.to(weight_VH.dtype)]
    return [*gradients, *([bias_grad] if bias_grad is not None else []), loss, values]


def visit_block(products_LV: Tensor, wanted: NextToken, at: slice) -> tuple[Tensor, ...]:
    """nll, log(Z)^2 and top1 of some rows; their products become the gradient of the loss."""
    logits_LV, label_L1 = wanted.ending.logits(products_LV), wanted.labels_N[at][:, None]
    best_L1 = logits_LV.amax(-1, keepdim=True)
    own_L1 = logits_LV.gather(1, label_L1)
    q_LV = (logits_LV - best_L1).exp_()
    sum_L1 = q_LV.sum(-1, keepdim=True)
    log_z_L1 = sum_L1.log() + best_L1
    q_LV.mul_((1 + 2 * wanted.z_loss * log_z_L1) / (sum_L1 * wanted.divisor))
    q_LV.scatter_add_(1, label_L1, (-1 / wanted.divisor).float().expand_as(label_L1).contiguous())
    products_LV.copy_(wanted.ending.backward(logits_LV, q_LV))
    values = (log_z_L1 - own_L1, log_z_L1**2, (own_L1 >= best_L1).float())
    return tuple(value_L1[:, 0] for value_L1 in values)
