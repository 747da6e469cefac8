"""Attention of the EAGLE-3 unroll (training-time test).

At step k a chain's row sees the step-0 keys of its document up to its slot, and its own keys of
steps 1..k. Scores exist for one block of rows at a time and are computed again in the backward
pass from the log-sum-exp over all keys, shared and own: with that and the merged output, the
gradients of the shared part are those of plain attention. Memory is linear in rows and positions.

Shape suffixes: R rows, T positions, L keys of a block, N query heads, M key-value heads,
G = N / M, E head size, J own keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

BLOCK_ROWS = {"cpu": 128, "cuda": 2**20}
"""The most rows whose scores exist together."""
CELLS = 2**22
"""The most scores of a head that exist together, where a block has more than 128 rows."""


class RowBlock(NamedTuple):
    """Rows [first, last) in the order of `Visible`, and the positions [low, high) that they see."""

    first: int
    last: int
    low: int
    high: int


class Visible(NamedTuple):
    """Which step-0 keys the rows of a step see: those of their document up to their slot, from
    `first_R` on."""

    order_R: Tensor
    """The rows in the order of their slots."""
    slot_R: Tensor
    """Their slots, in that order."""
    blocks: list[RowBlock]
    """Consecutive rows of one document each."""
    first_R: Tensor | None = None
    """The first position that each sees, in that order; None: its document's."""


def visible(
    slot_R: Tensor, start_R: Tensor, device: torch.device, first_R: Tensor | None = None
) -> Visible:
    """Cut rows into blocks of one document that are small enough for the device.

    Args:
        slot_R: slot of every row, on the CPU like all of the result.
        start_R: where its document starts.
        device: where the scores will be.
        first_R: the first position of a row's window; None: the document's.
    """
    order_R = torch.argsort(slot_R)
    if first_R is not None:
        first_R = torch.maximum(first_R, start_R)[order_R]
    slots, starts = slot_R[order_R].tolist(), start_R[order_R].tolist()
    lows = starts if first_R is None else first_R.tolist()
    most, blocks, first = BLOCK_ROWS[device.type], [], 0
    for row in range(1, len(slots) + 1):
        rows = row - first
        full = rows == most or (rows >= 128 and rows * (slots[row - 1] - lows[first]) >= CELLS)
        if row == len(slots) or starts[row] != starts[first] or full:
            blocks.append(RowBlock(first, row, min(lows[first:row]), slots[row - 1] + 1))
            first = row
    return Visible(order_R, slot_R[order_R], blocks, first_R)


def rotate(x_BSNE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """Apply rotary position embeddings (the two halves of E are the pairs); keeps x's dtype."""
    half = x_BSNE.shape[-1] // 2
    turned_BSNE = torch.cat([-x_BSNE[..., half:], x_BSNE[..., :half]], -1)
    cos_BS1E, sin_BS1E = cos_BSE.unsqueeze(-2), sin_BSE.unsqueeze(-2)
    return (x_BSNE * cos_BS1E + turned_BSNE * sin_BS1E).to(x_BSNE.dtype)


def block_scores(q_MRGE: Tensor, k_TME: Tensor, seen: Visible, block: RowBlock) -> Tensor:
    """Scores [M, R, G, L] in fp32, -inf where a row must not look; q carries the 1/sqrt(E)."""
    first, last, low, high = block
    M, _, G, _ = q_MRGE.shape
    flat = (q_MRGE[:, first:last].flatten(1, 2) @ k_TME[low:high].permute(1, 2, 0)).float()
    at_L = torch.arange(low, high, device=q_MRGE.device)
    hidden_RL = at_L > seen.slot_R[first:last, None]
    if seen.first_R is not None:
        hidden_RL |= at_L < seen.first_R[first:last, None]
    return flat.view(M, last - first, G, -1).masked_fill_(hidden_RL[:, None], float("-inf"))


def to_slots(x_RMGE: Tensor, seen: Visible) -> Tensor:
    """[R, M, G, E] -> [M, R, G, E], contiguous, rows in the order of their slots."""
    return x_RMGE[seen.order_R].transpose(0, 1).contiguous()


def from_slots(x_MRGE: Tensor, seen: Visible) -> Tensor:
    """Undo `to_slots`."""
    x_RMGE = x_MRGE.transpose(0, 1)
    return torch.empty_like(x_RMGE, memory_format=torch.contiguous_format).index_copy_(
        0, seen.order_R, x_RMGE
    )


def shared_forward(
    seen: Visible, q_RMGE: Tensor, k_TME: Tensor, v_TME: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to the step-0 keys alone: output [R, M, G, E] and logsumexp [R, M, G, 1]."""
    q_MRGE = to_slots(q_RMGE, seen)
    out_MRGE = torch.empty_like(q_MRGE)
    lse_MRG1 = torch.empty_like(q_MRGE[..., :1], dtype=torch.float32)
    for block in seen.blocks:
        rows = slice(block.first, block.last)
        scores = block_scores(q_MRGE, k_TME, seen, block)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        values = v_TME[block.low : block.high].transpose(0, 1)
        shared = (weights.flatten(1, 2).to(values.dtype) @ values).view_as(out_MRGE[:, rows])
        out_MRGE[:, rows] = shared / total.to(shared.dtype)
        lse_MRG1[:, rows] = top + total.log()
    return from_slots(out_MRGE, seen), from_slots(lse_MRG1, seen)


def shared_backward(
    seen: Visible,
    forward: tuple[Tensor, Tensor, Tensor],
    outer_RMGE: Tensor,
    lse_RMG1: Tensor,
    delta_RMG1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the gradient of the merged output, by block."""
    q_RMGE, k_TME, v_TME = forward
    q_MRGE, outer_MRGE = to_slots(q_RMGE, seen), to_slots(outer_RMGE, seen)
    lse_MRG1, delta_MRG1 = to_slots(lse_RMG1, seen), to_slots(delta_RMG1, seen)
    dq_MRGE = torch.empty_like(q_MRGE)
    dk_TME, dv_TME = torch.zeros_like(k_TME), torch.zeros_like(v_TME)
    for block in seen.blocks:
        rows, span = slice(block.first, block.last), slice(block.low, block.high)
        weights = block_scores(q_MRGE, k_TME, seen, block).sub_(lse_MRG1[:, rows]).exp_()
        outer = outer_MRGE[:, rows].flatten(1, 2)
        narrow = weights.flatten(1, 2).to(outer.dtype)
        dv_TME[span] += (narrow.transpose(1, 2) @ outer).transpose(0, 1)
        inner = (outer @ v_TME[span].permute(1, 2, 0)).view_as(weights).float()
        weights.mul_(inner.sub_(delta_MRG1[:, rows]))
        narrow = weights.flatten(1, 2).to(outer.dtype)
        dq_MRGE[:, rows] = (narrow @ k_TME[span].transpose(0, 1)).view_as(dq_MRGE[:, rows])
        q_flat = q_MRGE[:, rows].flatten(1, 2)
        dk_TME[span] += (narrow.transpose(1, 2) @ q_flat).transpose(0, 1)
    return from_slots(dq_MRGE, seen), dk_TME, dv_TME


def own_scores(q_RMGE: Tensor, keys: list[Tensor]) -> Tensor:
    """Scores of a row's own keys [R, M, G, J] in fp32."""
    columns = [(q_RMGE.float() * k_RME.float().unsqueeze(2)).sum(-1) for k_RME in keys]
    return torch.stack(columns, -1)


class _ChainAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, seen: Visible, q_RNE: Tensor, k_TME: Tensor, v_TME: Tensor, *own: Tensor
    ) -> Tensor:
        M, E = k_TME.shape[1:]
        keys, values = list(own[: len(own) // 2]), own[len(own) // 2 :]
        q_RMGE = q_RNE.unflatten(1, (M, -1)) * E**-0.5
        out_RMGE, lse_RMG1 = shared_forward(seen, q_RMGE, k_TME, v_TME)
        if keys:
            own_RMGJ = own_scores(q_RMGE, keys)
            merged_RMG1 = torch.logaddexp(lse_RMG1, torch.logsumexp(own_RMGJ, -1, keepdim=True))
            out_RMGE.mul_((lse_RMG1 - merged_RMG1).exp())
            weights_RMGJ = own_RMGJ.sub_(merged_RMG1).exp_().to(out_RMGE.dtype)
            for j, v_RME in enumerate(values):
                out_RMGE.addcmul_(weights_RMGJ[..., j, None], v_RME.unsqueeze(2))
            lse_RMG1 = merged_RMG1
        out_RNE = out_RMGE.flatten(1, 2)
        ctx.save_for_backward(q_RNE, k_TME, v_TME, out_RNE, lse_RMG1, *own)
        ctx.seen = seen
        return out_RNE

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        q_RNE, k_TME, v_TME, out_RNE, lse_RMG1, *own = ctx.saved_tensors
        M, E = k_TME.shape[1:]
        q_RMGE = q_RNE.unflatten(1, (M, -1)) * E**-0.5
        outer_RMGE = outer[0].unflatten(1, (M, -1))
        out_RMGE = out_RNE.unflatten(1, (M, -1))
        delta_RMG1 = (outer_RMGE.float() * out_RMGE.float()).sum(-1, keepdim=True)
        forward = (q_RMGE, k_TME, v_TME)
        dq_RMGE, dk_TME, dv_TME = shared_backward(
            ctx.seen, forward, outer_RMGE, lse_RMG1, delta_RMG1
        )
        keys, values = own[: len(own) // 2], own[len(own) // 2 :]
        dkeys: list[Tensor] = []
        dvalues: list[Tensor] = []
        if keys:
            weights_RMGJ = own_scores(q_RMGE, keys).sub_(lse_RMG1).exp_()
            for j, (k_RME, v_RME) in enumerate(zip(keys, values, strict=True)):
                weight = weights_RMGJ[..., j, None]
                inner = (outer_RMGE.float() * v_RME.float().unsqueeze(2)).sum(-1, keepdim=True)
                slope = (weight * (inner - delta_RMG1)).to(q_RNE.dtype)
                dq_RMGE.addcmul_(slope, k_RME.unsqueeze(2))
                dkeys.append((slope * q_RMGE).sum(2))
                dvalues.append((weight.to(q_RNE.dtype) * outer_RMGE).sum(2))
        return None, dq_RMGE.mul_(E**-0.5).flatten(1, 2), dk_TME, dv_TME, *dkeys, *dvalues


def chain_attention(
    seen: Visible,
    q_RNE: Tensor,
    shared: tuple[Tensor, Tensor],
    own_keys: list[Tensor],
    own_values: list[Tensor],
) -> Tensor:
    """Attention of one unroll step.

    Args:
        seen: what the rows see of the step-0 keys.
        q_RNE: rotated queries of the chains that are still alive.
        shared: step-0 keys (rotated) and values, [T, M, E] each.
        own_keys: rotated keys of steps 1..k of the same rows, [R, M, E] each.
        own_values: likewise.

    Returns:
        [R, N, E].
    """
    out: Tensor = _ChainAttention.apply(seen, q_RNE, *shared, *own_keys, *own_values)
    return out
