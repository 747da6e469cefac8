"""What happens to the heads of queries and keys before they meet: a norm, then a rotation.

Shape suffixes: P rows or positions, N heads, E head size.
"""

from typing import NamedTuple

from torch import Tensor

from specforge_exp.drafts.chain_attention import rotate
from specforge_exp.drafts.layers import RMSNorm


class Angles(NamedTuple):
    """Rotary angles [P, E], the two halves of E the same."""

    cos_PE: Tensor
    sin_PE: Tensor


class HeadTurn(NamedTuple):
    """A layer's norms and the angles of what it looks at."""

    slots: int
    """Rows of a block."""
    q_norm: RMSNorm
    k_norm: RMSNorm
    angles_T: Angles
    """Of the context's positions."""
    angles_Q: Angles
    """Of the rows'."""


def turned(norm: RMSNorm, x_PNE: Tensor, angles: Angles) -> Tensor:
    """Heads normed, then rotated."""
    return rotate(norm(x_PNE), *angles)


def turned_back(norm: RMSNorm, x_PNE: Tensor, angles: Angles, outer_PNE: Tensor) -> Tensor:
    """Gradient of the heads from that of `turned`; the norm's is added to its `.grad`."""
    inner_PNE = rotate(outer_PNE, angles.cos_PE, -angles.sin_PE)
    E = x_PNE.shape[-1]
    return norm.backward(x_PNE.reshape(-1, E), inner_PNE.view(-1, E)).view(x_PNE.shape)
