"""The rows that a draft's forward pass works on, over packed conversations.

Shape suffixes: T packed tokens, B conversations, R rows, K steps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_exp.drafts.chain_attention import Visible


def document_bounds(lengths: list[int] | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Start and end of the conversation that each packed token belongs to, [T] each."""
    sizes = torch.as_tensor(lengths, device=device)
    ends = sizes.cumsum(0)
    return (ends - sizes).repeat_interleave(sizes), ends.repeat_interleave(sizes)


def number_in_each(mask_T: Tensor, lengths_B: Tensor) -> Tensor:
    """How many entries of a mask each of the packed conversations has, [B]."""
    total_T = F.pad(mask_T.cumsum(0), (1, 0))
    return total_T[F.pad(lengths_B.cumsum(0), (1, 0))].diff()


@dataclass(frozen=True)
class Chains:
    """The rows of an unroll over packed conversations."""

    start_T: Tensor
    """Where each token's conversation starts."""
    end_T: Tensor
    """Where it ends."""
    lengths: list[int]
    """Tokens of each conversation."""
    slot_R: Tensor
    """The slot of each row, longest chain first."""
    counts: list[int]
    """Rows carried at every step; never rising."""
    supervised: list[Tensor]
    """Per step, bool [R_k]: whether the row's loss counts."""
    seen: list[Visible]
    """Per step, which step-0 keys its rows see."""

    def reads(self, step: int) -> Tensor:
        """Position of the token that the rows of a step read, which is where the teacher stands.

        One beyond the last token stands for everything outside the conversation.
        """
        rows = self.counts[step]
        at_R = self.slot_R[:rows] + 1 + step
        return torch.where(at_R < self.end_T[self.slot_R[:rows]], at_R, len(self.start_T))
