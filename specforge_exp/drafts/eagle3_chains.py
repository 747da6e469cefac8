"""Which (slot, step) pairs train, and which rows the unroll must carry for them.

Slot i at step k reads token i+1+k and the state of step k-1, and predicts token i+2+k against the
target's distribution at position i+1+k. Three ways to supervise:

    inference    token i+1 and token i+2+k belong to one assistant turn: the states that exist when
                 serving
    specforge    SpecForge 0.2.0: mask[i+k] (and the target's best token is in the draft's
                 vocabulary, which only the loss knows)
    speculators  speculators 0.9.0: mask[i+1+k]

A slot is carried through step k while any step k' >= k supervises it. Rows are the carried slots,
longest chain first, so the rows of every later step are the first ones of the step before: views,
never copies.

Shape suffixes: T packed tokens, R rows, K steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.attention import Visible, visible


def document_bounds(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Start and end of the conversation that each packed token belongs to, [T] each."""
    sizes = torch.tensor(lengths, device=device)
    ends = sizes.cumsum(0)
    return (ends - sizes).repeat_interleave(sizes), ends.repeat_interleave(sizes)


def shifted(values_T: Tensor, end_T: Tensor, by: int) -> Tensor:
    """values[i + by] at i, 0 where that lies outside the conversation."""
    at_T = torch.arange(len(values_T), device=values_T.device) + by
    inside_T = at_T < end_T
    return values_T[at_T.clamp(max=len(values_T) - 1)] * inside_T


def turn_masks(supervision: str, turns_T: Tensor, end_T: Tensor, steps: int) -> list[Tensor]:
    """Per step the slots [T] that the turns alone let train (specforge drops more)."""
    masks = []
    for step in range(steps):
        if supervision == "inference":
            first, predicted = shifted(turns_T, end_T, 1), shifted(turns_T, end_T, step + 2)
            masks.append((first > 0) & (first == predicted))
        elif supervision == "specforge":
            masks.append(shifted(turns_T, end_T, step) > 0)
        else:
            masks.append(shifted(turns_T, end_T, step + 1) > 0)
    return masks


@dataclass(frozen=True)
class Chains:
    """The rows of an unroll over packed conversations."""

    start_T: Tensor
    """Where each token's conversation starts."""
    end_T: Tensor
    """Where it ends."""
    longest: int
    """Tokens of the longest conversation."""
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


def make_chains(supervision: str, turns_T: Tensor, lengths: list[int], steps: int) -> Chains:
    """The rows of packed conversations.

    Args:
        supervision: inference, specforge or speculators.
        turns_T: assistant turn of every token, 0 elsewhere.
        lengths: tokens of each conversation.
        steps: how often the draft is fed its own state.
    """
    start_T, end_T = document_bounds(lengths, turns_T.device)
    masks = turn_masks(supervision, turns_T, end_T, steps)
    steps_K = torch.arange(1, len(masks) + 1, device=start_T.device)
    length_T = (torch.stack(masks, -1) * steps_K).amax(-1)
    order_T = torch.argsort(length_T, descending=True, stable=True)
    counts = (length_T[:, None] >= steps_K).sum(0).tolist()
    slot_R = order_T[: counts[0]]
    return Chains(
        start_T,
        end_T,
        max(lengths),
        slot_R,
        counts,
        [mask_T[slot_R[:rows]] for mask_T, rows in zip(masks, counts, strict=True)],
        [visible(slot_R[:rows], start_T[slot_R[:rows]]) for rows in counts],
    )
