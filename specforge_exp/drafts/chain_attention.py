"""Attention of the EAGLE-3 unroll (training-time test).

At step k a chain's row sees the step-0 keys of its document up to its slot, and its own keys of
steps 1..k. Scores exist for one block of rows at a time and are computed again in the backward
pass from the log-sum-exp over all keys, shared and own: with that and the merged output, the
gradients of the shared part are those of plain attention. Memory is linear in rows and positions.

By plain products, or by `kernels` where those are used.

Shape suffixes: R rows, T positions, L keys of a block, N query heads, M key-value heads,
G = N / M, E head size, J own keys, X heads of several kinds, B blocks of positions.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from specforge_exp.drafts.kernels import USED
from specforge_exp.drafts.layers import IN_ORDER
from specforge_exp.drafts.own_keys import OwnKeys, own_backward, own_forward

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
    at_T: Tensor
    """All positions."""
    first_R: Tensor | None = None
    """The first position that each sees, in that order; None: its document's."""
    keys_B2: Tensor | None = None
    """For kernels: of each block of positions the rows that see some, [begin, end) in that order;
    `blocks` is empty then."""

    @property
    def numbers(self) -> list[Tensor]:
        """What has to be on the device."""
        every = self.order_R, self.slot_R, self.first_R, self.keys_B2
        return [numbers for numbers in every if numbers is not None]

    def there(self, moved: Iterator[Tensor], at_T: Tensor) -> "Visible":
        """The same with `numbers` on the device, in their order."""
        order_R, slot_R = next(moved), next(moved)
        first_R = None if self.first_R is None else next(moved)
        keys_B2 = None if self.keys_B2 is None else next(moved)
        return Visible(order_R, slot_R, self.blocks, at_T, first_R, keys_B2)


def visible(
    slot_R: Tensor, start_R: Tensor, like: Tensor, first_R: Tensor | None = None
) -> Visible:
    """Cut rows into blocks of one document that are small enough for the device.

    Args:
        slot_R: slot of every row, on the CPU like all of the result.
        start_R: where its document starts.
        like: the states of all positions, on the device where the scores will be.
        first_R: the first position of a row's window; None: the document's.
    """
    order_R, at_T = torch.argsort(slot_R), torch.arange(len(like))
    if first_R is not None:
        first_R = torch.maximum(first_R, start_R)[order_R]
    ordered_R = slot_R[order_R]
    if like.device.type in USED:
        from specforge_exp.drafts.kernels.attention import key_rows

        first_R = start_R[order_R] if first_R is None else first_R
        keys_B2 = key_rows(ordered_R, first_R, len(like))
        return Visible(order_R, ordered_R, [], at_T, first_R, keys_B2)
    slots, starts = ordered_R.tolist(), start_R[order_R].tolist()
    lows = starts if first_R is None else first_R.tolist()
    most, blocks, first = BLOCK_ROWS[like.device.type], [], 0
    for row in range(1, len(slots) + 1):
        rows = row - first
        full = rows == most or (rows >= 128 and rows * (slots[row - 1] - lows[first]) >= CELLS)
        if row == len(slots) or starts[row] != starts[first] or full:
            blocks.append(RowBlock(first, row, min(lows[first:row]), slots[row - 1] + 1))
            first = row
    return Visible(order_R, ordered_R, blocks, at_T, first_R)


def rotate(x_BSNE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """Apply rotary position embeddings (the two halves of E are the pairs); keeps x's dtype."""
    half = x_BSNE.shape[-1] // 2
    cos_BS1E, sin_BS1E = cos_BSE.unsqueeze(-2), sin_BSE.unsqueeze(-2)
    if not (torch.is_grad_enabled() or IN_ORDER[x_BSNE.device.type]):
        out_BSNE, sin_BS1F = x_BSNE * cos_BS1E, sin_BS1E[..., :half]
        out_BSNE[..., :half].addcmul_(x_BSNE[..., half:], sin_BS1F, value=-1)
        out_BSNE[..., half:].addcmul_(x_BSNE[..., :half], sin_BS1F)
        return out_BSNE.to(x_BSNE.dtype)
    turned_BSNE = torch.cat([-x_BSNE[..., half:], x_BSNE[..., :half]], -1)
    return (x_BSNE * cos_BS1E + turned_BSNE * sin_BS1E).to(x_BSNE.dtype)


def turn_heads(x_RNE: Tensor, angles: tuple[Tensor, Tensor], back: bool = False) -> None:
    """Rotate heads in place, as `rotate`; the first half of the sines is negative."""
    cos_R1E, sin_R1E = (x_RE.unsqueeze(1) for x_RE in angles)
    sign, (one, other) = -1 if back else 1, x_RNE.chunk(2, -1)
    swapped_RNE, kept_RNE = torch.cat([other, one], -1), x_RNE * cos_R1E
    if IN_ORDER[x_RNE.device.type]:
        torch.add(kept_RNE, swapped_RNE * sin_R1E, alpha=sign, out=x_RNE)
    else:
        torch.addcmul(kept_RNE, swapped_RNE, sin_R1E, value=sign, out=x_RNE)


def block_scores(q_MRGE: Tensor, k_TME: Tensor, seen: Visible, block: RowBlock) -> Tensor:
    """Scores [M, R, G, L], -inf where a row must not look; q carries the 1/sqrt(E)."""
    first, last, low, high = block
    M, _, G, _ = q_MRGE.shape
    flat = q_MRGE[:, first:last].flatten(1, 2) @ k_TME[low:high].permute(1, 2, 0)
    at_L = seen.at_T[low:high]
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
    if seen.keys_B2 is not None:
        from specforge_exp.drafts.kernels.attention import shared_attention

        both: tuple[Tensor, Tensor] = shared_attention(q_RMGE, k_TME, v_TME, *seen.numbers[:3])
        return both
    q_MRGE = to_slots(q_RMGE, seen)
    out_MRGE = torch.empty_like(q_MRGE)
    lse_MRG1 = torch.empty_like(q_MRGE[..., :1], dtype=torch.float32)
    for block in seen.blocks:
        rows = slice(block.first, block.last)
        scores = block_scores(q_MRGE, k_TME, seen, block).float()
        values = v_TME[block.low : block.high].transpose(0, 1)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        shared = (weights.flatten(1, 2).to(values.dtype) @ values).view_as(out_MRGE[:, rows])
        out_MRGE[:, rows] = shared / total.to(shared.dtype)
        lse_MRG1[:, rows] = top + total.log()
    return from_slots(out_MRGE, seen), from_slots(lse_MRG1, seen)


def shared_backward(
    seen: Visible,
    forward: tuple[Tensor, Tensor, Tensor],
    outer_RMGE: Tensor,
    sums: tuple[Tensor, Tensor],
    back: tuple[Tensor, Tensor],
) -> Tensor:
    """Gradient of q from that of the merged output, by block.

    Args:
        seen: as in the forward pass.
        forward: q, k and v.
        outer_RMGE: the gradient.
        sums: logsumexp over all keys, and the sum of output times gradient, [R, M, G, 1] each.
        back: gets the gradients of k and v added.
    """
    if seen.keys_B2 is not None:
        from specforge_exp.drafts.kernels.attention import shared_keys, shared_queries

        every = [*forward], outer_RMGE.contiguous(), [x_RMG1.contiguous() for x_RMG1 in sums]
        shared_keys(*every, seen.numbers, *back)
        back_RMGE: Tensor = shared_queries(*every, seen.numbers[:3])
        return back_RMGE
    q_RMGE, k_TME, v_TME = forward
    q_MRGE, outer_MRGE = to_slots(q_RMGE, seen), to_slots(outer_RMGE, seen)
    lse_MRG1, delta_MRG1 = (to_slots(x_RMG1, seen) for x_RMG1 in sums)
    dq_MRGE, (dk_TME, dv_TME) = torch.empty_like(q_MRGE), back
    for block in seen.blocks:
        rows, span = slice(block.first, block.last), slice(block.low, block.high)
        weights = block_scores(q_MRGE, k_TME, seen, block).float().sub_(lse_MRG1[:, rows]).exp_()
        outer, q_flat = outer_MRGE[:, rows].flatten(1, 2), q_MRGE[:, rows].flatten(1, 2)
        inner = (outer @ v_TME[span].permute(1, 2, 0)).view_as(weights)
        dv_TME[span] += (weights.flatten(1, 2).to(outer.dtype).transpose(1, 2) @ outer).transpose(
            0, 1
        )
        slope = weights.mul_(inner.float().sub_(delta_MRG1[:, rows])).to(outer.dtype).flatten(1, 2)
        torch.bmm(slope, k_TME[span].transpose(0, 1), out=dq_MRGE[:, rows].flatten(1, 2))
        dk_TME[span] += (slope.transpose(1, 2) @ q_flat).transpose(0, 1)
    return from_slots(dq_MRGE, seen)


def row_dots(x_XE: Tensor, y_XE: Tensor) -> Tensor:
    """Sums of x y over the last dimension, kept as 1; fp32."""
    if x_XE.device.type not in USED:
        return (x_XE.float() * y_XE).sum(-1, keepdim=True)
    from specforge_exp.drafts.kernels.own import row_dots as kernel

    out: Tensor = kernel(x_XE, y_XE)
    return out


class LayerStep(NamedTuple):
    """A step of a layer."""

    seen: Visible
    """What its rows see of the step-0 keys."""
    angles: tuple[Tensor, Tensor]
    """cos and sin [R, E] of its rows, the first half of the sines negative."""
    own: OwnKeys
    number: int
    """0: the rows have no keys of their own."""

    def known(self, x_2JRME: Tensor) -> Tensor:
        """The part of its rows, of the steps up to this one."""
        return x_2JRME[:, : self.number, : len(self.angles[0])]


def placed(turn: LayerStep, M: int, half_RX: Tensor, token_RX: Tensor | None) -> Tensor:
    """The rotated queries of a step with the 1/sqrt(E) [R, M, G, E]; its own keys and values go to
    their place."""
    R, E = turn.angles[0].shape
    x_RX = half_RX.expand(R, -1).clone() if token_RX is None else half_RX + token_RX
    x_RXE = x_RX.view(R, -1, E)
    N = x_RXE.shape[1] - (2 * M if turn.number else 0)
    turn_heads(x_RXE[:, : N + M] if turn.number else x_RXE, turn.angles)
    if turn.number:
        kv_R2ME = x_RXE[:, N:].unflatten(1, (2, M))
        turn.own.kv_2JRME[:, turn.number - 1, :R] = kv_R2ME.transpose(0, 1)
    q_RNE: Tensor = x_RXE[:, :N] * E**-0.5
    return q_RNE.view(R, M, -1, E)


class _TurnedKeys(Function):
    @staticmethod
    def forward(ctx: Any, kv_TX: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        ctx.angles = angles
        kv_T2ME = kv_TX.unflatten(1, (2, -1, angles[0].shape[1]))
        kv_2TME: Tensor = kv_T2ME.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        turn_heads(kv_2TME[0], angles)
        return kv_2TME

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        back_T2ME = outer[0].transpose(0, 1).clone(memory_format=torch.contiguous_format)
        turn_heads(back_T2ME[:, 0], ctx.angles, back=True)
        return back_T2ME.flatten(1), None


def turned_keys(kv_TX: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Step-0 keys, rotated, and values [2, T, M, E]; angles as in `LayerStep`."""
    out: Tensor = _TurnedKeys.apply(kv_TX, angles)
    return out


class _ChainAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, turn: LayerStep, kv_2TME: Tensor, half_RX: Tensor, *more: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        M = kv_2TME.shape[2]
        q_RMGE = placed(turn, M, half_RX, more[0])
        out_RMGE, lse_RMG1 = shared_forward(turn.seen, q_RMGE, *kv_2TME)
        if turn.number:
            k_JRME, v_JRME = turn.known(turn.own.kv_2JRME)
            lse_RMG1 = own_forward(out_RMGE, lse_RMG1, q_RMGE, (k_JRME, v_JRME))
        ctx.save_for_backward(kv_2TME, q_RMGE, out_RMGE, lse_RMG1)
        ctx.turn, ctx.rows = turn, len(half_RX)
        return out_RMGE.flatten(1), half_RX.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        kv_2TME, q_RMGE, out_RMGE, lse_RMG1 = ctx.saved_tensors
        turn, own = ctx.turn, ctx.turn.own
        R, M, _, E = q_RMGE.shape
        outer_RMGE = outer[0].reshape(q_RMGE.shape).contiguous()
        sums = lse_RMG1, row_dots(outer_RMGE, out_RMGE)
        if own.back_2TME is None:
            own.back_2TME = torch.zeros_like(kv_2TME)
            own.back_2JRME = torch.zeros_like(own.kv_2JRME)
        in_order = IN_ORDER[kv_2TME.device.type]
        back_2TME = torch.zeros_like(kv_2TME) if in_order else own.back_2TME
        forward, (dk_TME, dv_TME) = (q_RMGE, *kv_2TME), back_2TME
        dq_RMGE = shared_backward(turn.seen, forward, outer_RMGE, sums, (dk_TME, dv_TME))
        if in_order:
            own.back_2TME += back_2TME
        heads = q_RMGE.shape[2] * M
        back_RXE = dq_RMGE.flatten(1, 2)
        if turn.number:
            mine, back_2JRME = (turn.known(x) for x in (own.kv_2JRME, own.back_2JRME))
            own_backward((q_RMGE, *mine), outer_RMGE, sums, dq_RMGE, back_2JRME)
            back_RXE = torch.cat([back_RXE.mul_(E**-0.5), *back_2JRME[:, -1]], 1)
            turn_heads(back_RXE[:, : heads + M], turn.angles, back=True)
        else:
            turn_heads(back_RXE.mul_(E**-0.5), turn.angles, back=True)
        back_RX = back_RXE.flatten(1)
        half_RX = back_RX if ctx.rows == R else back_RX.sum_to_size(1, back_RX.shape[1])
        token_RX = back_RX if ctx.needs_input_grad[3] else None
        return None, None if turn.number else own.back_2TME, half_RX, token_RX, None


def chain_attention(
    turn: LayerStep,
    kv_2TME: Tensor,
    half_RX: Tensor,
    token_RX: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of one step of a layer.

    Args:
        turn: the step.
        kv_2TME: the step-0 keys (rotated) and values.
        half_RX: queries, and unless at step 0 keys and values of the rows, not rotated; one row,
            where all have the same.
        token_RX: is added to them.
        before: the second result of the step before: its backward pass comes after this one's.

    Returns:
        [R, N * E], and what the next step is given as `before`.
    """
    out: tuple[Tensor, Tensor] = _ChainAttention.apply(turn, kv_2TME, half_RX, token_RX, before)
    return out
