"""Tokens from logits, by each row's own settings and random number.

Shape suffixes: B rows, N rows of one kind, V vocabulary, K the likeliest of it.
"""

import torch
from torch import Tensor

from specforge_exp.generation.engine import Sampling


def choose(logits_BV: Tensor, samplings: list[Sampling], uniforms: list[float]) -> list[int]:
    """One token per row; a row's choice depends on nothing in the other rows.

    Args:
        logits_BV: of any floating dtype.
        samplings: per row; the filters apply in the order top_k, top_p, min_p.
        uniforms: per row a number in [0, 1) at which the distribution function is inverted.
    """
    kinds = [kind(s) for s in samplings]
    chosen = [0] * len(kinds)
    for method in set(kinds):
        rows = [row for row, k in enumerate(kinds) if k == method]
        logits_NV = logits_BV if len(rows) == len(kinds) else logits_BV[rows]
        if method == "greedy":
            tokens_N = logits_NV.argmax(-1)
        else:
            tokens_N = sampled(
                logits_NV.float(), [samplings[r] for r in rows], [uniforms[r] for r in rows]
            )
        for row, token in zip(rows, tokens_N.tolist(), strict=True):
            chosen[row] = token
    return chosen


def penalise(logits_V: Tensor, ids: list[int], penalty: float) -> None:
    """Make the tokens of a sequence less likely, in place (CTRL, arXiv 1909.05858, section 4.1)."""
    ids_N = torch.tensor(sorted(set(ids)), device=logits_V.device)
    logits_N = logits_V[ids_N]
    logits_V[ids_N] = torch.where(logits_N > 0, logits_N / penalty, logits_N * penalty)


def kind(s: Sampling) -> str:
    """Rows of one kind are computed together: sorting costs far more than all the rest."""
    if s.temperature <= 0:
        return "greedy"
    return "top_k" if s.top_k > 0 else "sorted" if s.top_p < 1 or s.min_p > 0 else "plain"


def sampled(logits_NV: Tensor, samplings: list[Sampling], uniforms: list[float]) -> Tensor:
    """Tokens [N] of rows of one kind, which is not greedy."""

    def column(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=logits_NV.device)[:, None]

    temperature = column([s.temperature for s in samplings]).float()
    scaled_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)) / temperature
    of = kind(samplings[0])
    order_NK = None
    if of == "plain":
        weights_NK = scaled_NV.softmax(-1)
    else:
        most = min(max(s.top_k for s in samplings), scaled_NV.shape[-1])
        if of == "top_k":
            scaled_NK, order_NK = scaled_NV.topk(most)
            ranks_K = torch.arange(most, device=logits_NV.device)
            beyond_NK = ranks_K >= column([s.top_k for s in samplings])
            scaled_NK = scaled_NK.masked_fill(beyond_NK, -torch.inf)
        else:
            scaled_NK, order_NK = scaled_NV.sort(descending=True)
        weights_NK = scaled_NK.softmax(-1)
        before_NK = weights_NK.cumsum(-1, dtype=torch.float64) - weights_NK
        dropped_NK = before_NK >= column([s.top_p for s in samplings])
        dropped_NK |= weights_NK < weights_NK[:, :1] * column([s.min_p for s in samplings])
        dropped_NK[:, 0] = False
        weights_NK = weights_NK.masked_fill(dropped_NK, 0)
    summed_NK = weights_NK.cumsum(-1, dtype=torch.float64)
    total_N1 = summed_NK[:, -1:].clone()
    # Below the total even after rounding: beyond it are only tokens that were dropped.
    goal_N1 = torch.minimum(column(uniforms) * total_N1, total_N1.nextafter(0 * total_N1))
    place_N1 = torch.searchsorted(summed_NK, goal_N1, right=True)
    return (place_N1 if order_NK is None else order_NK.gather(1, place_N1))[:, 0]
