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

Shape suffixes: T packed tokens, B conversations, R rows, K steps.
"""

import torch
from torch import Tensor

from specforge_exp.drafts.rows import Chains, document_bounds, number_in_each


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


def nothing_to_learn(supervision: str, turns_T: Tensor, lengths_B: Tensor) -> dict[str, int]:
    """How many of packed conversations with these turns train nothing, by reason."""
    _, end_T = document_bounds(lengths_B, turns_T.device)
    (mask_T,) = turn_masks(supervision, turns_T, end_T, 1)
    empty_B = number_in_each(mask_T, lengths_B) == 0
    return {"without two supervised tokens in a row": int(empty_B.sum())}


def make_chains(supervision: str, turns_T: Tensor, lengths: list[int], steps: int) -> Chains:
    """The rows of packed conversations.

    Args:
        supervision: inference, specforge or speculators.
        turns_T: assistant turn of every token, 0 elsewhere.
        lengths: tokens of each conversation.
        steps: how often the draft is fed its own state.
    """
    _, end_T = document_bounds(lengths, turns_T.device)
    return chains_of(turn_masks(supervision, turns_T, end_T, steps), lengths)


def chains_of(masks: list[Tensor], lengths: list[int]) -> Chains:
    """The rows of packed conversations of these lengths whose slots [T] train where a step's mask
    says so."""
    start_T, end_T = document_bounds(lengths, masks[0].device)
    steps_K = torch.arange(1, len(masks) + 1, device=start_T.device)
    length_T = (torch.stack(masks, -1) * steps_K).amax(-1)
    order_T = torch.argsort(length_T, descending=True, stable=True)
    counts = (length_T[:, None] >= steps_K).sum(0).tolist()
    slot_R = order_T[: counts[0]]
    return Chains(
        start_T,
        end_T,
        lengths,
        slot_R,
        counts,
        [mask_T[slot_R[:rows]] for mask_T, rows in zip(masks, counts, strict=True)],
    )
