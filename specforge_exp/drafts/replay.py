"""The loss of a draft on what it proposed itself, at the positions that those proposals lead to.

A chain starts at an anchor, a token of the text. Step k proposes the (k + 1)-th token after it and
is taught by the target at anchor + first k proposed tokens. Behind the packed tokens stand one
empty place and the proposed tokens, step by step: a row reads its token, and finds its teacher,
there.

What was proposed is held constant: no gradient goes through the choice of a token. So the gradient
is that of the loss at these prefixes, not of its expectation over them: how a changed draft would
meet other prefixes is left out (a bias; the usual one of on-policy distillation).

Shape suffixes: T packed tokens, R chains, K steps, P proposed tokens that the target has read, H
hidden.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specforge_exp.drafts.head_loss import head_and_loss
from specforge_exp.drafts.rows import Chains, document_bounds
from specforge_exp.drafts.weighting import weighted
from specforge_exp.losses import Loss
from specforge_exp.target import Head
from specforge_exp.training.objective import Outcome, Replay, Sample


@dataclass(frozen=True)
class ReplayChains(Chains):
    """Chains that read proposed tokens."""

    chain_R: Tensor
    """Which of the proposed chains a row is."""

    def reads(self, step: int) -> Tensor:
        """The anchor, then the places of the proposed tokens."""
        if step == 0:
            return self.slot_R[: self.counts[0]] + 1
        first = len(self.start_T) + 1 + (step - 1) * len(self.chain_R)
        return first + self.chain_R[: self.counts[step]]


def proposing_chains(lengths: list[int], anchor_R: Tensor, steps: int) -> ReplayChains:
    """All chains in their order, carried through all steps."""
    start_T, end_T = document_bounds(lengths, anchor_R.device)
    rows = [len(anchor_R)] * steps
    everywhere = [torch.ones(len(anchor_R), dtype=torch.bool)] * steps
    numbers_R = torch.arange(len(anchor_R))
    return ReplayChains(start_T, end_T, lengths, anchor_R - 1, rows, everywhere, numbers_R)


def counted_chains(lengths: list[int], replay: Replay) -> ReplayChains:
    """The chains as far as they count, longest first."""
    length_R = replay.counts_RK.sum(1)
    order_R = torch.argsort(length_R, descending=True, stable=True)
    steps = range(replay.counts_RK.shape[1])
    counts = [int((length_R > step).sum()) for step in steps]
    chains = proposing_chains(lengths, replay.anchor_R[order_R], len(counts))
    counted = [
        replay.counts_RK[order_R[:rows], step] for step, rows in zip(steps, counts, strict=True)
    ]
    return replace(chains, counts=counts, supervised=counted, chain_R=order_R)


def replay_outcome(
    draft: Any, sample: Sample, target_head: Head, loss: Loss, cfg: Any, window_K: Tensor
) -> Outcome:
    """The replay's share of the window's loss; arguments as in `Draft.objective`.

    Every position weighs decay**k over the window's sum of those; a draft whose loss is the sum of
    its steps' means has it times the sum of the decays, so that it is as large as on the text.

    Args:
        window_K: positions of the window that count, by step.
    """
    replay, proposed = sample.replay, loss.proposed
    assert replay is not None
    assert proposed is not None
    chains, states, flops = draft.replayed(cfg, sample, replay)
    last_TH, steps = sample.last_TH, len(states)
    last_TH = torch.cat([last_TH, torch.zeros_like(last_TH[:1]), replay.last_PH])
    heads = replace(
        draft.heads(sample, target_head), last_TH=last_TH,
        next_T=torch.zeros(len(last_TH), dtype=torch.long, device=last_TH.device),
    )  # fmt: skip
    window_K = window_K[:steps].to(last_TH.device)
    decay_K = proposed.decay ** torch.arange(steps, device=last_TH.device)
    scale_K = decay_K / (decay_K * window_K).sum().clamp(min=1e-9)
    if draft.sums_steps:
        scale_K = scale_K * decay_K.sum()
    accepted_RK = replay.accepted_RK[chains.chain_R]
    total = Outcome(last_TH.new_zeros(()), torch.zeros(0), {}, flops=flops)
    for part, is_accepted in ((proposed.accepted, True), (proposed.rejected, False)):
        masks = [
            counted & (accepted_RK[: len(counted), step] == is_accepted)
            for step, counted in enumerate(chains.supervised)
        ]
        if part is None or not any(bool(mask.any()) for mask in masks):
            continue
        weights = weighted(part, scale_K.float(), decay_K)
        outcome = head_and_loss(replace(chains, supervised=masks), states, heads, weights)
        total = replace(total, loss=total.loss + outcome.loss, flops=total.flops + outcome.flops)
    sums = {
        "onpolicy/anchors": torch.tensor(len(replay.anchor_R)),
        "onpolicy/accepted": replay.accepted_RK.sum(),
        "onpolicy/verified_tokens": torch.tensor(len(replay.last_PH)),
        "onpolicy/loss": total.loss.detach(),
    }
    return replace(total, sums=sums)
