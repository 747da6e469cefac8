"""The rows that a draft's forward pass works on, over packed conversations.

They follow from turns and lengths alone, so all of it is made on the CPU; what the draft reads of
it goes to its device in one copy.

Shape suffixes: T packed tokens, B conversations, R rows, K steps, Q supervised rows of all steps,
P positions.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_exp.training.batches import moved_together


def document_bounds(lengths: list[int] | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Start and end of the conversation that each packed token belongs to, [T] each."""
    sizes = torch.as_tensor(lengths, device=device)
    ends = sizes.cumsum(0)
    return (ends - sizes).repeat_interleave(sizes), ends.repeat_interleave(sizes)


def number_in_each(mask_T: Tensor, lengths_B: Tensor) -> Tensor:
    """How many entries of a mask each of the packed conversations has, [B]."""
    total_T = F.pad(mask_T.cumsum(0), (1, 0))
    return total_T[F.pad(lengths_B.cumsum(0), (1, 0))].diff()


def possible_anchors(turns_T: Tensor, start_T: Tensor, end_T: Tensor) -> Tensor:
    """Whether tokens of packed conversations with these bounds may be anchors, tokens of a turn
    after which a draft proposes: never a first or a last one; [T] bool."""
    at_T = torch.arange(len(turns_T), device=turns_T.device)
    inside_T = (at_T > start_T) & (at_T + 1 < end_T)
    return inside_T & (turns_T > 0) & (turns_T == turns_T.roll(-1))


@dataclass(frozen=True)
class Rows:
    """Supervised rows of all steps, sorted by the position that teaches them."""

    flat_Q: Tensor
    """Index among the states of all steps, one step after the other."""
    step_Q: Tensor
    row_Q: Tensor
    at_Q: Tensor
    """Which of the needed positions."""
    position_P: Tensor
    """The needed positions, rising."""
    before: list[int]
    """How many rows stand before each position's; one entry more than positions."""

    def on(self, device: torch.device) -> "Rows":
        """The same on another device."""
        tensors = (self.flat_Q, self.step_Q, self.row_Q, self.at_Q, self.position_P)
        flat_Q, step_Q, row_Q, at_Q, position_P = moved_together(tensors, device)
        return Rows(flat_Q, step_Q, row_Q, at_Q, position_P, self.before)


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

    def reads(self, step: int) -> Tensor:
        """Position of the token that the rows of a step read, which is where the teacher stands.

        One beyond the last token stands for everything outside the conversation.
        """
        rows = self.counts[step]
        at_R = self.slot_R[:rows] + 1 + step
        return torch.where(at_R < self.end_T[self.slot_R[:rows]], at_R, len(self.start_T))

    @cached_property
    def rows(self) -> Rows:
        """The rows whose loss counts."""
        rows = [mask.nonzero()[:, 0] for mask in self.supervised]
        steps = [torch.full_like(row, step) for step, row in enumerate(rows)]
        position_Q = torch.cat([self.reads(step)[row] for step, row in enumerate(rows)])
        row_Q, step_Q = torch.cat(rows), torch.cat(steps)
        offset_K = torch.tensor([0, *self.counts[:-1]]).cumsum(0)
        order_Q = torch.argsort(position_Q, stable=True)
        row_Q, step_Q = row_Q[order_Q], step_Q[order_Q]
        position_P, at_Q, count_P = position_Q[order_Q].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        before = [0, *count_P.cumsum(0).tolist()]
        return Rows(row_Q + offset_K[step_Q], step_Q, row_Q, at_Q, position_P, before)
