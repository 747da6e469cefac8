"""Drafting with P-EAGLE: one pass over the verified positions and the masked ones after them.

Shape suffixes: S slots, A three target hidden sizes, H hidden, D draft vocabulary. Batch size is 1
throughout.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from specforge_exp.drafts.eagle3.decoder import Eagle3Decoder
from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.peagle.config import PEagleConfig


class PEagleDecoder(Eagle3Decoder):
    """Drafts for one request. The cache holds committed slots; masked ones are never kept."""

    def __init__(self, draft: Eagle3Model[PEagleConfig], mask_1A: Tensor) -> None:
        super().__init__(draft)
        self.mask_1A = mask_1A
        self.new: list[tuple[list[int], Tensor]] = []
        """Verified since the last pass: the tokens that are read, the states that enter."""

    @torch.no_grad()
    def commit(self, aux_1SA: Tensor, next_tokens: list[int]) -> None:
        """Take verified positions; as `Eagle3Decoder.commit`."""
        self.new.append((next_tokens, self.entered(aux_1SA)))

    @torch.no_grad()
    def propose(
        self, length: int, choose: Callable[[Tensor], int]
    ) -> tuple[list[int], list[Tensor]]:
        """Draft the tokens after the last committed slot; as `Eagle3Decoder.propose`."""
        assert self.new or self.committed, "commit comes before propose"
        masked, states = length - 1, [state_1SH for _, state_1SH in self.new]
        tokens = [token for tokens, _ in self.new for token in tokens]
        read = [*tokens, *[self.draft.config.mask_token_id] * masked]
        state_11H = self.entered(self.mask_1A[None])
        state_1SH = torch.cat([*states, state_11H.expand(-1, masked, -1)], 1)
        tokens_1S = torch.tensor([read], device=state_1SH.device)
        out_1SH = self.advance(tokens_1S, state_1SH, self.committed)
        self.committed += len(tokens)
        self.keep(self.committed)
        self.new = []
        logits = list(self.draft.lm_head(self.draft.norm(out_1SH[0, -length:])).float())
        chosen = [choose(logits_D) for logits_D in logits]
        return [token + int(self.draft.d2t[token]) for token in chosen], logits
