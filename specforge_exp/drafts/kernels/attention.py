"""Attention to the step-0 keys by Triton.

Rows are taken in the order of their slots; a program has the queries of one key-value head (rows
times G), so that they read its keys together. No score is kept; the backward pass makes them again
from the logsumexp. Sums are fp32 and always in the same order: no two programs add to one place.
What changes from batch to batch is not compiled into a kernel.

Shape suffixes: R rows, T positions, M key-value heads, G query heads of each, E head size, B
blocks of GRAIN positions. In kernels: N the SIDE queries of a program, K its SIDE keys.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specforge_exp.drafts.kernels.operators import launch, operator, packed
from specforge_exp.drafts.kernels.tiles import across, power, product, read, write

GRAIN = 32
"""Positions of a block, of which `key_rows` speaks; programs have one or two."""
NUMBERS = ["order", "slot", "first", "bounds"]
"""Arguments that are parts of one copy: where they begin in it changes from batch to batch."""
STAGES = 2
"""Tiles that are on their way into shared memory; three are more than a GPU of 24 GB has."""


@triton.jit
def queries(order, slot, first, at_N, inside_N, M, G):
    """Of queries in the order of their slots: place among all, and the first and last key seen."""
    index_N = at_N // G
    row_N = tl.load(order + index_N, mask=inside_N, other=0)
    last_N = tl.load(slot + index_N, mask=inside_N, other=-1).to(tl.int32)
    first_N = tl.load(first + index_N, mask=inside_N, other=2147483647).to(tl.int32)
    return (row_N * M + tl.program_id(1)) * G + at_N % G, first_N, last_N


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=NUMBERS[:3])
def forward_kernel(
    q, k, v, out, lse, order, slot, first, R, M, G, E, k_T, v_T,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One pass over the keys, with a running maximum."""
    width = tl.arange(0, WIDTH)
    at_N = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    real_N = at_N < R * G
    place_N, first_N, last_N = queries(order, slot, first, at_N, real_N, M, G)
    q_NE = read(q, place_N, real_N, E, width, E)
    head = tl.program_id(1) * E
    top_N = tl.full([SIDE], float("-inf"), tl.float32)
    total_N = tl.zeros([SIDE], tl.float32)
    sum_NE = tl.zeros([SIDE, WIDTH], tl.float32)
    end = tl.max(last_N, 0) + 1
    for low in range(tl.min(first_N, 0), end, SIDE):
        key_K = low + tl.arange(0, SIDE)
        k_KE = read(k + head, key_K, key_K < end, k_T, width, E)
        v_KE = read(v + head, key_K, key_K < end, v_T, width, E)
        scores_NK = product(q_NE, tl.trans(k_KE), WIDE)
        seen_NK = (key_K[None] >= first_N[:, None]) & (key_K[None] <= last_N[:, None])
        scores_NK = tl.where(seen_NK, scores_NK, float("-inf"))
        higher_N = tl.maximum(top_N, tl.max(scores_NK, 1))
        finite_N = tl.where(higher_N == float("-inf"), 0.0, higher_N)
        scale_N = tl.exp(top_N - finite_N)
        weights_NK = tl.exp(scores_NK - finite_N[:, None])
        total_N = total_N * scale_N + tl.sum(weights_NK, 1)
        more_NE = product(weights_NK.to(v_KE.dtype), v_KE, WIDE)
        sum_NE = sum_NE * scale_N[:, None] + more_NE
        top_N = higher_N
    some_N = tl.where(total_N > 0, total_N, 1.0)
    write(out, place_N, real_N, E, width, E, sum_NE / some_N[:, None])
    tl.store(lse + place_N, top_N + tl.log(some_N), mask=real_N)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=NUMBERS[:3])
def queries_kernel(
    q, k, v, outer, lse, delta, dq, order, slot, first, R, M, G, E, k_T, v_T,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries."""
    width = tl.arange(0, WIDTH)
    at_N = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    real_N = at_N < R * G
    place_N, first_N, last_N = queries(order, slot, first, at_N, real_N, M, G)
    q_NE = read(q, place_N, real_N, E, width, E)
    outer_NE = read(outer, place_N, real_N, E, width, E)
    lse_N = tl.load(lse + place_N, mask=real_N, other=0.0)
    delta_N = tl.load(delta + place_N, mask=real_N, other=0.0)
    head = tl.program_id(1) * E
    sum_NE = tl.zeros([SIDE, WIDTH], tl.float32)
    end = tl.max(last_N, 0) + 1
    for low in range(tl.min(first_N, 0), end, SIDE):
        key_K = low + tl.arange(0, SIDE)
        k_KE = read(k + head, key_K, key_K < end, k_T, width, E)
        v_KE = read(v + head, key_K, key_K < end, v_T, width, E)
        scores_NK = product(q_NE, tl.trans(k_KE), WIDE)
        seen_NK = (key_K[None] >= first_N[:, None]) & (key_K[None] <= last_N[:, None])
        weights_NK = tl.where(seen_NK, tl.exp(scores_NK - lse_N[:, None]), 0.0)
        inner_NK = product(outer_NE, tl.trans(v_KE), WIDE)
        slope_NK = weights_NK * (inner_NK - delta_N[:, None])
        sum_NE += product(slope_NK.to(k_KE.dtype), k_KE, WIDE)
    write(dq, place_N, real_N, E, width, E, sum_NE)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=NUMBERS)
def keys_kernel(
    q, k, v, outer, lse, delta, dk, dv, order, slot, first, bounds, T, M, G, E, k_T, v_T,
    GRAIN: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, added to what is there."""
    width = tl.arange(0, WIDTH)
    key_K = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    real_K = key_K < T
    head = tl.program_id(1) * E
    k_KE = read(k + head, key_K, real_K, k_T, width, E)
    v_KE = read(v + head, key_K, real_K, v_T, width, E)
    dk_KE = tl.zeros([SIDE, WIDTH], tl.float32)
    dv_KE = tl.zeros([SIDE, WIDTH], tl.float32)
    block = tl.program_id(0) * SIDE // GRAIN
    beyond = tl.minimum(block + SIDE // GRAIN, tl.cdiv(T, GRAIN))
    begin = tl.load(bounds + 2 * block).to(tl.int32) * G
    end = tl.load(bounds + 2 * beyond - 1).to(tl.int32) * G
    for low in range(begin, end, SIDE):
        at_N = low + tl.arange(0, SIDE)
        real_N = at_N < end
        place_N, first_N, last_N = queries(order, slot, first, at_N, real_N, M, G)
        q_NE = read(q, place_N, real_N, E, width, E)
        outer_NE = read(outer, place_N, real_N, E, width, E)
        lse_N = tl.load(lse + place_N, mask=real_N, other=0.0)
        delta_N = tl.load(delta + place_N, mask=real_N, other=0.0)
        scores_KN = product(k_KE, tl.trans(q_NE), WIDE)
        seen_KN = (key_K[:, None] >= first_N[None]) & (key_K[:, None] <= last_N[None])
        weights_KN = tl.where(seen_KN, tl.exp(scores_KN - lse_N[None]), 0.0)
        dv_KE += product(weights_KN.to(outer_NE.dtype), outer_NE, WIDE)
        inner_KN = product(v_KE, tl.trans(outer_NE), WIDE)
        slope_KN = weights_KN * (inner_KN - delta_N[None])
        dk_KE += product(slope_KN.to(q_NE.dtype), q_NE, WIDE)
    if begin < end:
        dk_KE += read(dk + head, key_K, real_K, M * E, width, E).to(tl.float32)
        dv_KE += read(dv + head, key_K, real_K, M * E, width, E).to(tl.float32)
        write(dk + head, key_K, real_K, M * E, width, E, dk_KE)
        write(dv + head, key_K, real_K, M * E, width, E, dv_KE)


def key_rows(slot_R: Tensor, first_R: Tensor, positions: int) -> Tensor:
    """Of each block of keys the rows that see some of them, [begin, end) in the order of their
    slots, [B, 2]; by rising slots and the first positions seen."""
    low_B = torch.arange(0, positions, GRAIN)
    begin_B = torch.searchsorted(slot_R, low_B)
    # Where windows differ within a slot, the firsts do not rise: what bounds them from below does.
    bound_R = first_R.flip(0).cummin(0).values.flip(0)
    end_B = torch.searchsorted(bound_R, low_B + GRAIN - 1, right=True)
    return torch.stack([begin_B, end_B.maximum(begin_B)], 1)


def tiles(q_RMGE: Tensor) -> dict[str, Any]:
    """Sizes of a program: what it holds fits 99 kB, a GPU's shared memory where it is smallest."""
    width, wide = power(q_RMGE.shape[-1]), triton.knobs.runtime.interpret
    side = 2 * GRAIN if width * q_RMGE.element_size() <= 256 else GRAIN
    return {"SIDE": side, "WIDTH": width, "WIDE": wide, "num_stages": STAGES}


@operator()
def shared_attention(
    q_RMGE: Tensor, k_TME: Tensor, v_TME: Tensor, order_R: Tensor, slot_R: Tensor, first_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to the keys [first, slot] of each row: output like q, logsumexp [R, M, G, 1] fp32,
    -inf (and output 0) where a row sees none.

    `order_R` has the rows in the order of their slots; `slot_R` and `first_R` follow it.
    """
    packed(q_RMGE, order_R, slot_R, first_R)
    packed(k_TME, v_TME, outer=1)
    R, M, G, E = q_RMGE.shape
    out_RMGE = torch.empty_like(q_RMGE)
    lse_RMG1 = torch.empty(R, M, G, 1, dtype=torch.float32, device=q_RMGE.device)
    arrays = q_RMGE, k_TME, v_TME, out_RMGE, lse_RMG1, order_R, slot_R, first_R
    numbers = R, M, G, E, k_TME.stride(0), v_TME.stride(0)
    sizes = tiles(q_RMGE)
    launch(forward_kernel, (across(R * G, sizes["SIDE"]), M), *arrays, *numbers, **sizes)
    return out_RMGE, lse_RMG1


@operator()
def shared_queries(
    forward: list[Tensor], outer_RMGE: Tensor, sums: list[Tensor], seen: list[Tensor]
) -> Tensor:
    """Gradient of the queries.

    Args:
        forward: q, k and v.
        outer_RMGE: gradient of the output.
        sums: logsumexp over all keys, and the sum of output times gradient, [R, M, G, 1] fp32.
        seen: order, slots and firsts, as `shared_attention`.
    """
    q_RMGE, k_TME, v_TME = forward
    packed(q_RMGE, outer_RMGE, *sums, *seen)
    packed(k_TME, v_TME, outer=1)
    R, M, G, E = q_RMGE.shape
    back_RMGE = torch.empty_like(q_RMGE)
    numbers = R, M, G, E, k_TME.stride(0), v_TME.stride(0)
    arrays = *forward, outer_RMGE, *sums, back_RMGE, *seen
    sizes = tiles(q_RMGE)
    launch(queries_kernel, (across(R * G, sizes["SIDE"]), M), *arrays, *numbers, **sizes)
    return back_RMGE


@operator("back_TME", "back_v_TME")
def shared_keys(
    forward: list[Tensor], outer_RMGE: Tensor, sums: list[Tensor], seen: list[Tensor],
    back_TME: Tensor, back_v_TME: Tensor,
) -> None:  # fmt: skip
    """Gradients of keys and values, added; arguments as `shared_queries`, with the fourth of
    `seen`, what `key_rows` gives."""
    q_RMGE, k_TME, v_TME = forward
    packed(q_RMGE, outer_RMGE, *sums, *seen, back_TME, back_v_TME)
    packed(k_TME, v_TME, outer=1)
    (_, M, G, E), T = q_RMGE.shape, len(k_TME)
    numbers = T, M, G, E, k_TME.stride(0), v_TME.stride(0)
    arrays = *forward, outer_RMGE, *sums, back_TME, back_v_TME, *seen
    sizes = {"GRAIN": GRAIN, **tiles(q_RMGE)}
    launch(keys_kernel, (across(T, sizes["SIDE"]), M), *arrays, *numbers, **sizes)
