"""What everybody's P-EAGLE trains on: the depths of one conversation, drawn once for all.

Shape suffixes: T tokens, N rows.
"""

import torch
from torch import Tensor


def drawn(mask_T: Tensor, depths: int) -> tuple[Tensor, Tensor]:
    """Anchor and depth of every row [N], as speculators orders them: all slots at depth 0, then
    chains that stay whole, (n - d) * max(0.7**d, 0.2) at depth d of n supervised tokens."""
    counts_T = mask_T[1:].bool()
    generator = torch.Generator().manual_seed(0)
    anchors, alive_N = [torch.arange(len(counts_T))], counts_T.nonzero()[:, 0] - 1
    n = len(alive_N)
    for depth in range(1, depths):
        inside_N = alive_N + depth < len(counts_T)
        alive_N = alive_N[inside_N]
        alive_N = alive_N[counts_T[alive_N + depth] & (alive_N >= 0)]
        size = int((n - depth) * max(0.7**depth, 0.2))
        chosen_N = torch.randperm(len(alive_N), generator=generator)[:size]
        alive_N = alive_N[chosen_N].sort().values
        anchors.append(alive_N)
    sizes = torch.tensor([len(anchor_N) for anchor_N in anchors])
    return torch.cat(anchors), torch.arange(depths).repeat_interleave(sizes)
