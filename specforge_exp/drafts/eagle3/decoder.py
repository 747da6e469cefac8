"""Drafting with EAGLE-3: a cache of keys and values made from the target's own states.

Shape suffixes: S slots, A three target hidden sizes, H hidden, D draft vocabulary, M key-value
heads, E head size. Batch size is 1 throughout.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_exp.drafts.eagle3.model import Eagle3Model


class Eagle3Decoder:
    """Drafts chains for one request.

    The cache holds slots made from the target's states (`commit`). A chain appends slots made
    from the draft's own states and forgets them when the next commit comes, exactly as training
    unrolls them.
    """

    def __init__(self, draft: Eagle3Model) -> None:
        self.draft = draft
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.committed = 0
        self.state_11H: Tensor | None = None

    @torch.no_grad()
    def commit(self, aux_1SA: Tensor, next_tokens: list[int]) -> None:
        """Take verified positions.

        Args:
            aux_1SA: the target's auxiliary states at those positions.
            next_tokens: the S tokens that follow each of them.
        """
        del self.keys[1:], self.values[1:]
        tokens_1S = torch.tensor([next_tokens], device=aux_1SA.device)
        state_1SH = self.draft.fc(aux_1SA.to(self.draft.fc.weight.dtype))
        self.state_11H = self.advance(tokens_1S, state_1SH, self.committed)[:, -1:]
        self.keys = [torch.cat(self.keys, 1)]
        self.values = [torch.cat(self.values, 1)]
        self.committed += len(next_tokens)

    def advance(self, tokens_1S: Tensor, state_1SH: Tensor, position: int) -> Tensor:
        """One pass of the layer over new slots that see each other causally and all before."""
        slots = tokens_1S.shape[1]
        positions_1S = torch.arange(position, position + slots, device=tokens_1S.device)[None]
        q, k, v = self.draft.project(tokens_1S, state_1SH, positions_1S)
        self.keys.append(k)
        self.values.append(v)
        keys, values = torch.cat(self.keys, 1), torch.cat(self.values, 1)
        seen = keys.shape[1]
        causal = torch.ones(slots, seen, dtype=torch.bool, device=q.device).tril(seen - slots)
        q_1NSE, k_1MLE, v_1MLE = (x.transpose(1, 2) for x in (q, keys, values))
        out_1NSE = F.scaled_dot_product_attention(
            q_1NSE, k_1MLE, v_1MLE, attn_mask=causal, enable_gqa=True
        )
        return self.draft.finish(state_1SH, out_1NSE.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def propose(
        self, length: int, choose: Callable[[Tensor], int]
    ) -> tuple[list[int], list[Tensor]]:
        """Draft a chain after the last committed slot.

        Args:
            length: tokens to draft.
            choose: draft logits [D] -> draft id.

        Returns:
            The target ids drafted, and the logits [D] each was chosen from.
        """
        assert self.state_11H is not None, "commit comes before propose"
        state_11H = self.state_11H
        tokens: list[int] = []
        logits: list[Tensor] = []
        for step in range(length):
            if step > 0:
                last_11 = torch.tensor([[tokens[-1]]], device=state_11H.device)
                state_11H = self.advance(last_11, state_11H, self.committed - 1 + step)
            logits_D = self.draft.lm_head(self.draft.norm(state_11H))[0, 0].float()
            chosen = choose(logits_D)
            tokens.append(chosen + int(self.draft.d2t[chosen]))
            logits.append(logits_D)
        return tokens, logits
