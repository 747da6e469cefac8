"""Sums over rows, and what they say to the training loop.

Shape suffixes: N rows of a block, R rows, K steps, B conversations.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from specforge_exp.drafts.layers import IN_ORDER
from specforge_exp.drafts.rows import Chains


@dataclass
class RowSums:
    """What a pass over all rows gives."""

    alpha_KR: Tensor
    """Acceptance rate of each counted row at temperature 1, 0 elsewhere."""
    counted_KR: Tensor
    """Which rows counted, bool."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Per value the sum over rows of every step, [K]."""

    every_KR: dict[str, Tensor] = field(default_factory=dict)
    """On a GPU, until `add_up`: by index it adds in the order in which its threads come, never
    twice the same sum."""

    def add(self, step_N: Tensor, row_N: Tensor, values: dict[str, Tensor]) -> None:
        """Add rows' values to the sums of their steps; each row comes once."""
        self.alpha_KR[step_N, row_N] = values["alpha"]
        for name, value_N in values.items():
            if IN_ORDER[step_N.device.type]:
                if name not in self.values:
                    self.values[name] = torch.zeros(len(self.alpha_KR), device=value_N.device)
                self.values[name].index_add_(0, step_N, value_N.float())
            elif name != "alpha":
                if name not in self.every_KR:
                    self.every_KR[name] = torch.zeros_like(self.alpha_KR)
                self.every_KR[name][step_N, row_N] = value_N.float()

    def add_up(self) -> None:
        """When all rows have come."""
        if not self.values and self.every_KR:
            every_KR = {"alpha": self.alpha_KR, **self.every_KR}
            self.values = {name: value_KR.sum(1) for name, value_KR in every_KR.items()}


def reported(sums: RowSums, chain: RowSums) -> dict[str, Tensor]:
    """Sums for the metrics: values, rows, and the simulated accepted length.

    The length is 1 + sum_k prod_{j<=k} alpha_j over slots supervised at every step, by the rates in
    `chain`: the mean of products, bonus token included, is what sampling from the draft would earn.
    """
    values = {name: value for name, value in sums.values.items() if name != "loss"}
    for name in ("alpha", "top1"):
        values.setdefault(name, torch.zeros(len(sums.alpha_KR), device=sums.alpha_KR.device))
    values["rows"] = sums.counted_KR.sum(1)
    length_R, everywhere_R = simulated_lengths(chain)
    values["length"] = (length_R * everywhere_R).sum()
    values["length_slots"] = everywhere_R.sum()
    return values


def simulated_lengths(sums: RowSums) -> tuple[Tensor, Tensor]:
    """The simulated accepted length of every row, and whether it is supervised at every step."""
    return 1 + sums.alpha_KR.cumprod(0).sum(0), sums.counted_KR.all(0)


def by_conversation(sums: RowSums, chains: Chains) -> Tensor:
    """What `simulated_length` is the quotient of, summed over each conversation; [B, 2] float64."""
    length_R, everywhere_R = simulated_lengths(sums)
    end_B = torch.tensor(chains.lengths).cumsum(0)
    conversation_R = torch.bucketize(chains.slot_R[: len(length_R)], end_B, right=True)
    conversation_R = conversation_R.to(length_R.device)
    both_R2 = torch.stack([length_R, torch.ones_like(length_R)], 1) * everywhere_R[:, None]
    sums_B2 = torch.zeros(len(end_B), 2, dtype=torch.float64, device=length_R.device)
    return sums_B2.index_add_(0, conversation_R, both_R2.double())
