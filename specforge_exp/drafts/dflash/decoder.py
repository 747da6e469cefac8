"""Drafting with DFlash: one pass fills a block of masked tokens after the last committed one.

Shape suffixes: S slots, A auxiliary states, H hidden, V vocabulary, M key-value heads, E head
size. Batch size is 1 throughout.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_exp.drafts.chain_attention import rotate
from specforge_exp.drafts.dflash.model import DFlashLayer, DFlashModel


class DFlashDecoder:
    """Drafts blocks for one request.

    The cache holds every layer's keys and values of committed positions, made from the target's
    states; a block's own are made for it and never kept.
    """

    def __init__(self, draft: DFlashModel) -> None:
        self.draft = draft
        self.keys: list[list[Tensor]] = [[] for _ in draft.layers]
        self.values: list[list[Tensor]] = [[] for _ in draft.layers]
        self.committed = 0
        self.last = -1

    @torch.no_grad()
    def commit(self, aux_1SA: Tensor, next_tokens: list[int]) -> None:
        """Take verified positions.

        Args:
            aux_1SA: the target's auxiliary states at those positions.
            next_tokens: the S tokens that follow each of them.
        """
        draft, dtype = self.draft, self.draft.fc.weight.dtype
        context_SH = draft.hidden_norm(draft.fc(aux_1SA[0].to(dtype)))
        for index, layer in enumerate(draft.layers):
            k_SME, v_SME = self.pair(layer, context_SH, self.committed)
            self.keys[index] = [torch.cat([*self.keys[index], k_SME])]
            self.values[index] = [torch.cat([*self.values[index], v_SME])]
        self.committed += len(next_tokens)
        self.last = next_tokens[-1]

    def pair(self, layer: DFlashLayer, x_SH: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, [S, M, E] each, of positions from `position` on."""
        attn, E = layer.self_attn, self.draft.config.head_dim
        at_S = torch.arange(position, position + len(x_SH), device=x_SH.device)
        k_SME = attn.k_norm(attn.k_proj(x_SH).unflatten(-1, (-1, E)))
        rotated = rotate(k_SME, *self.draft.angles(at_S, x_SH))
        return rotated, attn.v_proj(x_SH).unflatten(-1, (-1, E))

    @torch.no_grad()
    def propose(
        self, length: int, choose: Callable[[Tensor], int]
    ) -> tuple[list[int], list[Tensor]]:
        """Draft the tokens after the last committed one, all in one pass.

        Args:
            length: tokens to draft, at most those that a block says.
            choose: logits [V] -> token.

        Returns:
            The tokens drafted, and the logits [V] each was chosen from.
        """
        hidden_SH = self.fill(length)[self.draft.first_slot :]
        logits = list(F.linear(hidden_SH, self.draft.head_VH.to(hidden_SH.dtype)).float())
        return [choose(logits_V) for logits_V in logits], logits

    def fill(self, length: int) -> Tensor:
        """Normed states [S, H] of all slots of a block that says so many tokens, if it is as long;
        the first slot is the last committed token's."""
        assert self.last >= 0, "commit comes before propose"
        draft, device = self.draft, self.draft.embed_VH.device
        slots = min(length + draft.first_slot, draft.config.block_size)
        ids_S = torch.full((slots,), draft.config.mask_token_id, device=device)
        ids_S[0] = self.last
        state_SH = F.embedding(ids_S, draft.embed_VH).to(draft.fc.weight.dtype)
        at_S = torch.arange(self.committed, self.committed + slots, device=device)
        angles = draft.angles(at_S, state_SH)
        for index, (layer, sliding) in enumerate(zip(draft.layers, draft.sliding, strict=True)):
            attn, E = layer.self_attn, draft.config.head_dim
            x_SH = layer.input_layernorm(state_SH)
            q_SNE = rotate(attn.q_norm(attn.q_proj(x_SH).unflatten(-1, (-1, E))), *angles)
            k_SME, v_SME = self.pair(layer, x_SH, self.committed)
            q, k, v = (
                x.transpose(0, 1)[None]
                for x in (
                    q_SNE,
                    torch.cat([*self.keys[index], k_SME]),
                    torch.cat([*self.values[index], v_SME]),
                )
            )
            mask_SP = self.window(at_S) if sliding else None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SP, enable_gqa=True)
            state_SH = state_SH + attn.o_proj(out[0].transpose(0, 1).flatten(1))
            state_SH = state_SH + layer.mlp(layer.post_attention_layernorm(state_SH))
        normed_SH: Tensor = draft.norm(state_SH)
        return normed_SH

    def window(self, at_S: Tensor) -> Tensor:
        """Which committed positions and slots of the block at `at_S` each slot sees in a layer with
        a window; [S, P] bool."""
        anchor_S = torch.full_like(at_S, self.committed)
        at_P = torch.arange(self.committed + len(at_S), device=at_S.device)
        seen_SP = at_P >= self.draft.window_start(anchor_S, at_S)[:, None]
        if not self.draft.config.sliding_window_non_causal:
            seen_SP &= at_P <= at_S[:, None]
        return seen_SP
