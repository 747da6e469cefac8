"""Drafting with EAGLE-3: a cache of keys and values made from the target's own states.

Shape suffixes: S slots, A three target hidden sizes, H hidden, D draft vocabulary, M key-value
heads, E head size. Batch size is 1 throughout.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_exp.drafts.eagle3.model import Eagle3Model


class Eagle3Decoder:
    """Drafts chains for one request.

    The cache of every layer holds slots made from the target's states (`commit`). A chain appends
    slots made from the draft's own states and forgets them when the next commit comes, exactly as
    training unrolls them.
    """

    def __init__(self, draft: Eagle3Model[Any]) -> None:
        self.draft = draft
        self.keys: list[list[Tensor]] = [[] for _ in draft.stack]
        self.values: list[list[Tensor]] = [[] for _ in draft.stack]
        self.committed = 0
        self.state_11H: Tensor | None = None

    @torch.no_grad()
    def commit(self, aux_1SA: Tensor, next_tokens: list[int]) -> None:
        """Take verified positions.

        Args:
            aux_1SA: the target's auxiliary states at those positions.
            next_tokens: the S tokens that follow each of them.
        """
        tokens_1S = torch.tensor([next_tokens], device=aux_1SA.device)
        state_1SH = self.entered(aux_1SA)
        self.keep(self.committed)
        self.state_11H = self.advance(tokens_1S, state_1SH, self.committed)[:, -1:]
        self.committed += len(next_tokens)
        self.keep(self.committed)

    def entered(self, aux_1SA: Tensor) -> Tensor:
        """The states that enter the first layer, from the target's."""
        out: Tensor = self.draft.fc(self.draft.read(aux_1SA.to(self.draft.fc.weight.dtype)))
        return out

    def keep(self, slots: int) -> None:
        """Forget all but the first slots."""
        for cache in (*self.keys, *self.values):
            cache[:] = [torch.cat(cache, 1)[:, :slots]] if cache else []

    def advance(self, tokens_1S: Tensor, state_1SH: Tensor, position: int) -> Tensor:
        """One pass of the layers over new slots that see each other causally and all before, as far
        as their windows reach."""
        draft, slots = self.draft, tokens_1S.shape[1]
        positions_1S = torch.arange(position, position + slots, device=tokens_1S.device)[None]
        for number, window in enumerate(draft.variant.windows):
            q, k, v = draft.project(tokens_1S, state_1SH, positions_1S, number)
            self.keys[number].append(k)
            self.values[number].append(v)
            keys, values = torch.cat(self.keys[number], 1), torch.cat(self.values[number], 1)
            seen = keys.shape[1]
            mask = torch.ones(slots, seen, dtype=torch.bool, device=q.device).tril(seen - slots)
            if window is not None:
                mask = mask.triu(seen - slots - window + 1)
            q_1NSE, k_1MLE, v_1MLE = (x.transpose(1, 2) for x in (q, keys, values))
            out_1NSE = F.scaled_dot_product_attention(
                q_1NSE, k_1MLE, v_1MLE, attn_mask=mask, enable_gqa=True
            )
            state_1SH = draft.finish(state_1SH, out_1NSE.transpose(1, 2).flatten(2), number)
        return state_1SH

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
                fed_11H = self.draft.recycled(state_11H)
                state_11H = self.advance(last_11, fed_11H, self.committed - 1 + step)
            logits_D = self.draft.lm_head(self.draft.norm(state_11H))[0, 0].float()
            chosen = choose(logits_D)
            tokens.append(chosen + int(self.draft.d2t[chosen]))
            logits.append(logits_D)
        return tokens, logits
