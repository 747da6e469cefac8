"""Attention of a DFlash layer: a block sees the context before its anchor, and itself.

The slots of a block see the keys of their conversation strictly before the anchor, whose own state
does not exist when serving, and all slots of their own block, whatever their order. The two parts
are merged by their log-sum-exp; scores of the context exist for some rows at a time. Scores, norms
of the heads and rotations are computed again in the backward pass.

With a window a slot sees the end of that context only; `causal`: of its block what is before it.

Shape suffixes: R blocks, S slots of a block, Q = R * S rows, T positions, P either, N query heads,
M key-value heads, G = N / M, E head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from specforge_exp.drafts.chain_attention import Visible, shared_backward, shared_forward
from specforge_exp.drafts.dflash.heads import BlockLayout, Norms, turned, turned_back


def by_block(x_QMGE: Tensor, slots: int) -> Tensor:
    """[Q, M, G, E] -> [R, M, S * G, E]."""
    blocks: Tensor = x_QMGE.unflatten(0, (-1, slots)).transpose(1, 2).flatten(2, 3)
    return blocks


def by_row(x_RMXE: Tensor, slots: int) -> Tensor:
    """Undo `by_block`."""
    rows: Tensor = x_RMXE.unflatten(2, (slots, -1)).transpose(1, 2).flatten(0, 1)
    return rows


def own_scores(q_RMXE: Tensor, k_QME: Tensor, layout: BlockLayout) -> Tensor:
    """Scores [R, M, S * G, S] in fp32 of a block's slots with each other, -inf where hidden."""
    slots = layout.slots
    scores = (q_RMXE @ own(k_QME, slots).transpose(2, 3)).float()
    if layout.causal:
        hidden_SS = torch.ones(slots, slots, dtype=torch.bool, device=scores.device).triu(1)
        grouped = scores.unflatten(2, (slots, -1))
        scores = grouped.masked_fill(hidden_SS[:, None], float("-inf")).flatten(2, 3)
    return scores


def own(x_QME: Tensor, slots: int) -> Tensor:
    """[Q, M, E] -> [R, M, S, E]."""
    blocks: Tensor = x_QME.unflatten(0, (-1, slots)).transpose(1, 2)
    return blocks


class _BlockAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, layout: BlockLayout, norms: Norms, q_QNE: Tensor, *keys: Tensor
    ) -> Tensor:
        k_TME, v_TME, k_QME, v_QME = keys
        seen, slots, (q_norm, k_norm) = layout.seen, layout.slots, norms
        angles_T, angles_Q = layout.angles_T, layout.angles_Q
        assert isinstance(seen, Visible)
        M, E = k_TME.shape[1:]
        q_QMGE = turned(q_norm, q_QNE, angles_Q).mul_(E**-0.5).unflatten(1, (M, -1))
        out_QMGE, lse_QMG1 = shared_forward(seen, q_QMGE, turned(k_norm, k_TME, angles_T), v_TME)
        turned_QME = turned(k_norm, k_QME, angles_Q)
        scores = own_scores(by_block(q_QMGE, slots), turned_QME, layout)
        own_lse_QMG1 = by_row(torch.logsumexp(scores, -1, keepdim=True), slots)
        merged_QMG1 = torch.logaddexp(lse_QMG1, own_lse_QMG1)
        weights = scores.sub_(by_block(merged_QMG1, slots)).exp_().to(v_QME.dtype)
        out_QMGE.mul_((lse_QMG1 - merged_QMG1).exp())
        out_QMGE += by_row(weights @ own(v_QME, slots), slots)
        out_QNE = out_QMGE.flatten(1, 2)
        ctx.save_for_backward(q_QNE, *keys, out_QNE, merged_QMG1)
        ctx.layout, ctx.norms = layout, norms
        return out_QNE

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        q_QNE, k_TME, v_TME, k_QME, v_QME, out_QNE, lse_QMG1 = ctx.saved_tensors
        layout, (q_norm, k_norm) = ctx.layout, ctx.norms
        slots, angles_T, angles_Q = layout.slots, layout.angles_T, layout.angles_Q
        M, E = k_TME.shape[1:]
        q_QMGE = turned(q_norm, q_QNE, angles_Q).mul_(E**-0.5).unflatten(1, (M, -1))
        outer_QMGE = outer[0].unflatten(1, (M, -1))
        delta_QN1 = (outer[0].float() * out_QNE.float()).sum(-1, keepdim=True)
        delta_QMG1 = delta_QN1.unflatten(1, (M, -1))
        keys = (turned(k_norm, k_TME, angles_T), v_TME)
        dk_TME, dv_TME = torch.zeros_like(k_TME), torch.zeros_like(v_TME)
        sums = lse_QMG1, delta_QMG1
        dq_QMGE = shared_backward(layout.seen, (q_QMGE, *keys), outer_QMGE, sums, (dk_TME, dv_TME))
        q_RMXE, outer_RMXE = by_block(q_QMGE, slots), by_block(outer_QMGE, slots)
        turned_QME = turned(k_norm, k_QME, angles_Q)
        weights = own_scores(q_RMXE, turned_QME, layout).sub_(by_block(lse_QMG1, slots)).exp_()
        dv_RMSE = weights.to(outer_RMXE.dtype).transpose(2, 3) @ outer_RMXE
        inner = (outer_RMXE @ own(v_QME, slots).transpose(2, 3)).float()
        slope = weights.mul_(inner.sub_(by_block(delta_QMG1, slots))).to(q_QNE.dtype)
        dq_QMGE += by_row(slope @ own(turned_QME, slots), slots)
        dk_RMSE = slope.transpose(2, 3) @ q_RMXE
        dk_QME, dv_QME = (x.transpose(1, 2).flatten(0, 1) for x in (dk_RMSE, dv_RMSE))
        return (
            None,
            None,
            turned_back(q_norm, q_QNE, angles_Q, dq_QMGE.mul_(E**-0.5).flatten(1, 2)),
            turned_back(k_norm, k_TME, angles_T, dk_TME),
            dv_TME,
            turned_back(k_norm, k_QME, angles_Q, dk_QME),
            dv_QME,
        )


def block_attention(
    layout: BlockLayout,
    norms: Norms,
    q_QNE: Tensor,
    context: tuple[Tensor, Tensor],
    block: tuple[Tensor, Tensor],
) -> Tensor:
    """Attention of one layer; keeps what it is given and the output.

    Args:
        layout: where the rows stand and what they see.
        norms: of the heads.
        q_QNE: queries, the slots of a block one after the other.
        context: keys and values of all positions, [T, M, E] each.
        block: keys and values of the rows themselves, [Q, M, E] each.

    Returns:
        [Q, N, E].
    """
    out: Tensor = _BlockAttention.apply(layout, norms, q_QNE, *context, *block)
    return out
