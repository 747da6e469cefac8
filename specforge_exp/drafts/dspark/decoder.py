"""Drafting with DSpark: one pass fills a block, then its tokens are picked one after the other.

Shape suffixes: S slots, H hidden, F rank, V vocabulary. Batch size is 1 throughout.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_exp.drafts.dflash.decoder import DFlashDecoder


class DSparkDecoder(DFlashDecoder):
    """Drafts blocks for one request, as far as their confidence says that verifying pays."""

    draft: Any
    cost: float | None = None
    """Of one more token in a verification, in verifications of a single token; None: whole blocks.
    """

    def economise(self, cost: float) -> None:
        """As `bench.speculative.Confident`: a chain ends at the first token that lowers the
        expected tokens per cost, by the product of the confidences up to it.

        A confidence reads the tokens before it and not its own, so what is said stays the target's
        distribution. The product never rises: what follows would not pay either.
        """
        assert self.draft.confidence_head is not None
        self.cost = cost

    @torch.no_grad()
    def propose(
        self, length: int, choose: Callable[[Tensor], int]
    ) -> tuple[list[int], list[Tensor]]:
        """Draft the tokens after the last committed one, at most so many; as `DFlashDecoder`."""
        draft, markov = self.draft, self.draft.markov_head
        hidden_SH = self.fill(length)
        base_SV = F.linear(hidden_SH, draft.head_VH.to(hidden_SH.dtype)).float()
        token, memory, stands, expected = self.last, None, 1.0, 1.0
        chain: list[int] = []
        logits: list[Tensor] = []
        for slot in range(len(hidden_SH)):
            hidden_1H, ids_1 = hidden_SH[slot, None], torch.tensor([token], device=base_SV.device)
            before_1F = markov.embedded(ids_1, hidden_SH.dtype)
            feature_1F, memory = markov.step(before_1F, hidden_1H, memory)
            if slot < draft.first_slot:
                continue
            if self.cost is not None:
                stands *= float(torch.sigmoid(draft.confidence_head(hidden_1H, before_1F)))
                if stands * (1 + self.cost * len(chain)) < self.cost * expected:
                    break
                expected += stands
            logits_V = base_SV[slot] + markov.markov_w2(feature_1F)[0].float()
            token = choose(logits_V)
            chain.append(token)
            logits.append(logits_V)
        return chain, logits
