"""The keys that a row has of its own, merged into its attention by Triton; sums are fp32.

Shape suffixes: R rows, J own keys, M key-value heads, G query heads of each, E head size, N rows
of a matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specforge_exp.drafts.kernels.operators import launch, operator, packed
from specforge_exp.drafts.kernels.tiles import across, power, read, write

ROWS = 16
"""Rows of a program."""


@triton.jit(do_not_specialize=["R", "J"])
def own_forward_kernel(
    out, lse, q, k, v, R, J, M, G, E, k_J, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Each own key is one more term of the softmax."""
    width = tl.arange(0, WIDTH)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_R = row_R < R
    mine = tl.program_id(1)
    for g in range(G):
        place_R = (row_R * M + mine) * G + g
        q_RE = read(q, place_R, real_R, E, width, E).to(tl.float32)
        sum_RE = read(out, place_R, real_R, E, width, E).to(tl.float32)
        top_R = tl.load(lse + place_R, mask=real_R, other=0.0)
        total_R = tl.where(top_R == float("-inf"), 0.0, 1.0)
        for j in range(J):
            head = tl.cast(j, tl.int64) * k_J + mine * E
            k_RE = read(k + head, row_R, real_R, M * E, width, E).to(tl.float32)
            v_RE = read(v + head, row_R, real_R, M * E, width, E).to(tl.float32)
            score_R = tl.sum(q_RE * k_RE, 1)
            higher_R = tl.maximum(top_R, score_R)
            scale_R, weight_R = tl.exp(top_R - higher_R), tl.exp(score_R - higher_R)
            sum_RE = sum_RE * scale_R[:, None] + v_RE * weight_R[:, None]
            total_R = total_R * scale_R + weight_R
            top_R = higher_R
        write(out, place_R, real_R, E, width, E, sum_RE / total_R[:, None])
        tl.store(lse + place_R, top_R + tl.log(total_R), mask=real_R)


@triton.jit(do_not_specialize=["R", "J"])
def own_backward_kernel(
    q, k, v, outer, lse, delta, dq, dk, dv, R, J, M, G, E, k_J,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of own keys and values, and their part of the queries'."""
    width = tl.arange(0, WIDTH)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_R = row_R < R
    mine = tl.program_id(1)
    for part in range(G + J):
        # First the queries, a head at a time over all keys; then the keys, over all heads.
        sum_RE = tl.zeros([ROWS, WIDTH], tl.float32)
        more_RE = tl.zeros([ROWS, WIDTH], tl.float32)
        for other in range(tl.where(part < G, J, G)):
            g = tl.where(part < G, part, other)
            j = tl.where(part < G, other, part - G)
            place_R = (row_R * M + mine) * G + g
            head = tl.cast(j, tl.int64) * k_J + mine * E
            k_RE = read(k + head, row_R, real_R, M * E, width, E).to(tl.float32)
            v_RE = read(v + head, row_R, real_R, M * E, width, E).to(tl.float32)
            q_RE = read(q, place_R, real_R, E, width, E).to(tl.float32)
            outer_RE = read(outer, place_R, real_R, E, width, E).to(tl.float32)
            lse_R = tl.load(lse + place_R, mask=real_R, other=0.0)
            delta_R = tl.load(delta + place_R, mask=real_R, other=0.0)
            weight_R = tl.exp(tl.sum(q_RE * k_RE, 1) - lse_R)
            slope_R = weight_R * (tl.sum(outer_RE * v_RE, 1) - delta_R)
            sum_RE += slope_R[:, None] * tl.where(part < G, k_RE, q_RE)
            more_RE += weight_R[:, None] * outer_RE
        if part < G:
            place_R = (row_R * M + mine) * G + part
            sum_RE += read(dq, place_R, real_R, E, width, E).to(tl.float32)
            write(dq, place_R, real_R, E, width, E, sum_RE)
        else:
            head = tl.cast(part - G, tl.int64) * k_J + mine * E
            sum_RE += read(dk + head, row_R, real_R, M * E, width, E).to(tl.float32)
            more_RE += read(dv + head, row_R, real_R, M * E, width, E).to(tl.float32)
            write(dk + head, row_R, real_R, M * E, width, E, sum_RE)
            write(dv + head, row_R, real_R, M * E, width, E, more_RE)


@triton.jit(do_not_specialize=["N"])
def dot_kernel(x, y, out, N, E, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of x y over the last dimension."""
    width = tl.arange(0, WIDTH)
    at_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_NE = read(x, at_N, at_N < N, E, width, E).to(tl.float32)
    y_NE = read(y, at_N, at_N < N, E, width, E).to(tl.float32)
    tl.store(out + at_N, tl.sum(x_NE * y_NE, 1), mask=at_N < N)


@operator("out_RMGE", "lse_RMG1")
def own_attention(
    out_RMGE: Tensor, lse_RMG1: Tensor, q_RMGE: Tensor, k_JRME: Tensor, v_JRME: Tensor
) -> None:
    """Merge a row's own keys into its output and its logsumexp."""
    packed(out_RMGE, lse_RMG1, q_RMGE)
    packed(k_JRME, v_JRME, outer=1)
    R, M, G, E = q_RMGE.shape
    arrays = out_RMGE, lse_RMG1, q_RMGE, k_JRME, v_JRME
    numbers = R, len(k_JRME), M, G, E, k_JRME.stride(0)
    launch(
        own_forward_kernel, (across(R, ROWS), M), *arrays, *numbers, ROWS=ROWS, WIDTH=power(E)
    )  # fmt: skip


@operator("back_RMGE", "back_JRME", "back_v_JRME")
def own_gradients(
    forward: list[Tensor], outer_RMGE: Tensor, sums: list[Tensor], back_RMGE: Tensor,
    back_JRME: Tensor, back_v_JRME: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of q and of a row's own keys and values; arguments as `shared_queries` in
    attention.py."""
    q_RMGE, k_JRME, v_JRME = forward
    packed(q_RMGE, outer_RMGE, *sums, back_RMGE)
    packed(k_JRME, v_JRME, back_JRME, back_v_JRME, outer=1)
    R, M, G, E = q_RMGE.shape
    arrays = *forward, outer_RMGE, *sums, back_RMGE, back_JRME, back_v_JRME
    numbers = R, len(k_JRME), M, G, E, k_JRME.stride(0)
    launch(
        own_backward_kernel, (across(R, ROWS), M), *arrays, *numbers, ROWS=ROWS, WIDTH=power(E)
    )  # fmt: skip


@operator()
def row_dots(x_NE: Tensor, y_NE: Tensor) -> Tensor:
    """Sums of x y over the last dimension, which stays as 1; fp32."""
    packed(x_NE, y_NE)
    E = x_NE.shape[-1]
    out = torch.empty(*x_NE.shape[:-1], 1, dtype=torch.float32, device=x_NE.device)
    N = out.numel()
    launch(dot_kernel, (across(N, ROWS),), x_NE, y_NE, out, N, E, BLOCK=ROWS, WIDTH=power(E))
    return out
