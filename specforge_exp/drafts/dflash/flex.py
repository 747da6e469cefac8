"""Attention of DFlash blocks by FlexAttention: on CUDA one fused kernel that skips what is hidden.

The same attention as `attention.block_attention`, whose plain products work on any device.
Rows and positions are padded to multiples of BUCKET, so that a training knows few shapes.

Shape suffixes: T positions, Q rows, N query heads, M key-value heads, E head size, P padded.
"""

import logging
import os
from functools import cache
from shutil import which
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from specforge_exp.drafts.dflash.heads import BlockLayout, Hidden, Norms, turned

log = logging.getLogger(__name__)
BUCKET = 256


def padded(number: int) -> int:
    """The next multiple of BUCKET, at least one."""
    return max(1, -(-number // BUCKET)) * BUCKET


def hide(
    anchor_Q: Tensor, first_Q: Tensor, slots: int, positions: int, causal: bool = False
) -> Hidden:
    """The mask of rows that see the context before their anchor, and their own block.

    Args:
        anchor_Q: position of each row's anchor.
        first_Q: the first position that a row sees: of the anchor's conversation, or its window.
        slots: rows of a block; they follow each other.
        positions: T.
        causal: see `BlockLayout`.
    """
    rows, columns = padded(len(anchor_Q)), padded(positions)
    more = (0, rows - len(anchor_Q))
    anchor_P, first_P = F.pad(anchor_Q, more), F.pad(first_Q, more)

    def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        before = (column >= first_P[row]) & (column < anchor_P[row])
        own = (column - columns) // slots == row // slots
        if causal:
            own = own & (column - columns <= row)
        return torch.where(column < columns, before, own)

    mask = masker(anchor_Q.device.type)(
        sees, None, None, rows, columns + rows, device=str(anchor_Q.device)
    )
    return Hidden(mask, rows, columns)


def flex_block_attention(
    layout: BlockLayout,
    norms: Norms,
    q_QNE: Tensor,
    context: tuple[Tensor, Tensor],
    block: tuple[Tensor, Tensor],
) -> Tensor:
    """As `attention.block_attention`, where `layout.seen` is what `hide` made."""
    hidden, (q_norm, k_norm) = layout.seen, norms
    assert isinstance(hidden, Hidden)
    if not len(q_QNE):
        return q_QNE
    keys = turned(k_norm, context[0], layout.angles_T), turned(k_norm, block[0], layout.angles_Q)
    k_1MPE, v_1MPE = (
        torch.cat([grown(shared, hidden.positions), grown(own, hidden.rows)]).transpose(0, 1)[None]
        for shared, own in (keys, (context[1], block[1]))
    )
    q_1NPE = grown(turned(q_norm, q_QNE, layout.angles_Q), hidden.rows).transpose(0, 1)[None]
    attend = kernel(q_QNE.device.type)
    out_1NPE: Tensor = attend(q_1NPE, k_1MPE, v_1MPE, block_mask=hidden.mask, enable_gqa=True)
    return out_1NPE[0].transpose(0, 1)[: len(q_QNE)]


def grown(x_PNE: Tensor, length: int) -> Tensor:
    """Zeros after the last row up to `length`."""
    return F.pad(x_PNE, (0, 0, 0, 0, 0, length - len(x_PNE)))


def useful(attention: str, device: torch.device, head_dim: int) -> bool:
    """Whether draft.attention means FlexAttention here: auto takes it where it has a kernel."""
    fits = head_dim >= 16 and head_dim & (head_dim - 1) == 0
    possible = device.type == "cuda" and fits and compiler_is_there()
    return attention == "flex" or (attention == "auto" and possible)


@cache
def compiler_is_there() -> bool:
    """Whether Triton finds the C compiler that it needs to start a kernel; the log says so if not:
    bare images lack one."""
    there = bool(os.environ.get("CC") or which("gcc") or which("clang"))
    if not there:
        log.warning("attention by plain products: no gcc or clang is here for FlexAttention")
    return there


@cache
def kernel(device: str) -> Any:
    """FlexAttention, compiled where it has kernels; eagerly it is dense."""
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


@cache
def masker(device: str) -> Any:
    """What makes the mask: compiled on CUDA, where it would otherwise be dense for a moment."""
    return torch.compile(create_block_mask) if device == "cuda" else create_block_mask
