"""From the tally of a pass over all rows to what the training loop is told.

Shape suffixes: R rows, K steps, B conversations.
"""

import torch
from torch import Tensor

from specforge_exp.drafts.head_loss import Tally, Weighting
from specforge_exp.drafts.rows import Chains


def step_values(found: Tally, measured: Weighting) -> Tensor:
    """The loss of each step, decay included, from the sums; [K] fp32."""
    total_K = torch.zeros_like(measured.scale_K)
    if measured.function is not None:
        return total_K + measured.scale_K * found.sums.get("loss", 0)
    for name, weight_K in measured.terms.items():
        total_K = total_K + weight_K * found.sums.get(name, 0)
    return total_K


def reported(found: Tally) -> dict[str, Tensor]:
    """Sums for the metrics: values, rows, and the simulated accepted length.

    The length is 1 + sum_k prod_{j<=k} alpha_j over slots supervised at every step: the mean of
    products, bonus token included, is what sampling from the draft would earn.
    """
    sums = {name: value for name, value in found.sums.items() if name != "loss"}
    for name in ("alpha", "top1"):
        sums.setdefault(name, torch.zeros(len(found.alpha_KR), device=found.alpha_KR.device))
    sums["rows"] = found.counted_KR.sum(1)
    length_R, everywhere_R = simulated_lengths(found)
    sums["length"] = (length_R * everywhere_R).sum()
    sums["length_slots"] = everywhere_R.sum()
    return sums


def simulated_lengths(found: Tally) -> tuple[Tensor, Tensor]:
    """The simulated accepted length of every row, and whether it is supervised at every step."""
    return 1 + found.alpha_KR.cumprod(0).sum(0), found.counted_KR.all(0)


def by_conversation(found: Tally, carried: Chains, lengths: list[int]) -> Tensor:
    """What `simulated_length` is the quotient of, summed over each conversation; [B, 2] float64."""
    length_R, everywhere_R = simulated_lengths(found)
    end_B = torch.tensor(lengths, device=length_R.device).cumsum(0)
    conversation_R = torch.bucketize(carried.slot_R[: len(length_R)], end_B, right=True)
    both_R2 = torch.stack([length_R, torch.ones_like(length_R)], 1) * everywhere_R[:, None]
    found_B2 = torch.zeros(len(lengths), 2, dtype=torch.float64, device=length_R.device)
    return found_B2.index_add_(0, conversation_R, both_R2.double())
