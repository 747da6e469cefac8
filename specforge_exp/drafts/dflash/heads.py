"""Where the rows of blocks stand and what they see; the norm and the rotation of their heads.

Shape suffixes: T positions, Q rows, P rows or positions, N heads, E head size.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from specforge_exp.drafts.chain_attention import Visible, rotate
from specforge_exp.drafts.layers import RMSNorm


class Angles(NamedTuple):
    """Rotary angles [P, E], the two halves of E the same."""

    cos_PE: Tensor
    sin_PE: Tensor


Norms = tuple[RMSNorm, RMSNorm]
"""Of the heads of queries and of keys."""


@dataclass(frozen=True)
class Hidden:
    """What the rows of blocks may see, for all layers of a forward."""

    mask: BlockMask
    rows: int
    """Q, padded."""
    positions: int
    """T, padded."""


@dataclass(frozen=True)
class BlockLayout:
    """Where the rows of all blocks stand and what they see, for all layers of a forward."""

    seen: Visible | Hidden
    """What the rows see of the context: up to the position before their anchor."""
    slots: int
    """Rows of a block."""
    causal: bool
    """Whether a row sees those of its block alone that stand before it, and itself."""
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
    return norm.backward(x_PNE.reshape(-1, E), inner_PNE.reshape(-1, E)).view(x_PNE.shape)
