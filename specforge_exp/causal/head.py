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

from specforge_exp.drafts.head_loss import BLOCK, LOGITS, head_logits, logits_buffer
from specforge_exp.target.head import Ending


@dataclass(frozen=True)
class NextToken:
    """What is predicted, and how it counts."""

    labels_N: Tensor
    divisor: Tensor
    """[]; of the sums over the rows."""
    z_loss: float
    ending: Ending


Values = dict[str, Tensor]
"""Of every row, detached, [N] fp32: nll, -log q(next); squared, log(Z)^2; top1, 1 where no other
token is more likely than the next one."""


def next_token_loss(
    state_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, wanted: NextToken
) -> tuple[Tensor, Values]:
    """The loss over rows, to be differentiated, and values of each row.

    Args:
        state_NH: post-norm states; their dtype is that of the products.
        weight_VH: the head, of any dtype.
        bias_V: its bias.
        wanted: the labels.
    """
    weights = [weight_VH] if bias_V is None else [weight_VH, bias_V]
    gradients = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
    gradients = gradients if torch.is_grad_enabled() else []
    loss, state_grad, values = visit(state_NH, weights, wanted, gradients)
    loss = _Differentiated.apply(loss, [state_grad, *gradients], state_NH, *weights)
    return loss, values


class _Differentiated(Function):
    """A value whose gradient in some tensors is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        pairs = zip(gradients, tensors, strict=False)  # without gradients there are none of weights
        ctx.save_for_backward(*(gradient.to(tensor.dtype) for gradient, tensor in pairs))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * outer[0] for gradient in ctx.saved_tensors)


@torch.no_grad()
def visit(
    state_NH: Tensor, weights: list[Tensor], wanted: NextToken, gradients: list[Tensor]
) -> tuple[Tensor, Tensor, Values]:
    """The loss, the gradient of the states (0 without `gradients`), and the values.

    Args:
        state_NH: as `next_token_loss`.
        weights: the head, and its bias if it has one.
        wanted: the labels.
        gradients: get those of the weights added, in fp32; [] makes none.
    """
    V, device = len(weights[0]), state_NH.device
    narrow_VH = weights[0].to(state_NH.dtype)
    size, block = (max(1, limit[device.type] // V) for limit in (LOGITS, BLOCK))
    buffer_MV = logits_buffer(min(size, len(state_NH)), state_NH, narrow_VH)
    state_grad, visited = torch.zeros_like(state_NH), []
    chunks = (x.split(size) for x in (state_NH, state_grad, wanted.labels_N))
    for state_MH, back_MH, label_M in zip(*chunks, strict=True):
        logits_MV = head_logits(state_MH, narrow_VH, buffer_MV)
        for bias_V in weights[1:]:
            logits_MV += bias_V
        blocks = zip(logits_MV.split(block), label_M.split(block), strict=True)
        visited += [visit_block(*part, wanted) for part in blocks]
        if gradients:
            narrow_MV = logits_MV.to(state_NH.dtype)
            torch.mm(narrow_MV, narrow_VH, out=back_MH)
            if narrow_MV.dtype == torch.float32:
                gradients[0].addmm_(narrow_MV.T, state_MH)
            else:
                gradients[0] += narrow_MV.T @ state_MH
        for bias_grad in gradients[1:]:
            bias_grad.add_(logits_MV.sum(0))
    nll_N, squared_N, top1_N = (torch.cat(parts) for parts in zip(*visited, strict=True))
    summed = nll_N.double().sum() + wanted.z_loss * squared_N.double().sum()
    values = {"nll": nll_N, "squared": squared_N, "top1": top1_N}
    return (summed / wanted.divisor).float(), state_grad, values


def visit_block(products_LV: Tensor, label_L: Tensor, wanted: NextToken) -> tuple[Tensor, ...]:
    """nll, log(Z)^2 and top1 of some rows; their products become the gradient of the loss."""
    logits_LV, label_L1 = wanted.ending.logits(products_LV), label_L[:, None]
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
