"""Chains of proposed tokens in the model's own forward, as onpolicy=replay asks for them.

Behind the packed tokens stand the proposed ones, step by step. A proposed token sees its
conversation up to its anchor, the tokens of its chain before it, and itself.

Shape suffixes: T packed tokens, R chains, K steps, Q = (K - 1) * R proposed tokens that are read, L
= T + Q places, M places of a forward, H hidden, D draft vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from specforge_exp.drafts.replay import ReplayChains
from specforge_exp.drafts.rows import document_bounds
from specforge_exp.target import packing
from specforge_exp.target.anatomy import CACHE
from specforge_exp.target.segments import seeing
from specforge_exp.training.batches import moved, moved_together
from specforge_exp.training.objective import Replay, Sample


@dataclass
class Layout:
    """Where text and proposals stand, and what the model has read of them."""

    at_L: Tensor
    """Positions in their conversations."""
    seen_LL: Tensor
    cache: DynamicCache = field(default_factory=DynamicCache)
    done: int = 0

    def read(self, draft: Any, ids_M: Tensor) -> Tensor:
        """Post-norm last states [M, H] of the next places."""
        causal = draft.causal
        model, rows = causal.model, slice(self.done, self.done + len(ids_M))
        self.done = rows.stop
        text = model.config.get_text_config()
        own = text._attn_implementation
        # Attention by conversation knows no chains; what it calls for each takes any mask.
        plain = {mine: theirs for theirs, mine in packing.NAMES.items()}
        model.set_attn_implementation(plain.get(own, own))
        try:
            seen_ML, at_M = self.seen_LL[rows, : rows.stop], self.at_L[rows]
            with draft.narrow(ids_M.device), seeing(text, seen_ML, at_M, self.at_L[: rows.stop]):
                out = causal.decoder(
                    ids_M[None], position_ids=at_M[None], use_cache=True,
                    **{CACHE: self.cache},
                )  # fmt: skip
        finally:
            model.set_attn_implementation(own)
        state_MH: Tensor = out.last_hidden_state[0].to(draft.compute_dtype)
        return state_MH


def layout(lengths: list[int], anchor_R: Tensor, steps: int, device: torch.device) -> Layout:
    """Packed conversations, and behind them the tokens that `steps` - 1 steps propose."""
    start_T, _ = document_bounds(lengths, anchor_R.device)
    place_T = torch.arange(len(start_T))
    after_Q = torch.arange(1, steps).repeat_interleave(len(anchor_R))
    chain_Q = torch.arange(len(anchor_R)).repeat(steps - 1)
    anchor_Q = anchor_R[chain_Q]
    last_L, start_L = torch.cat([place_T, anchor_Q]), torch.cat([start_T, start_T[anchor_Q]])
    at_L = last_L - start_L + torch.cat([torch.zeros_like(place_T), after_Q])
    place_T, last_L, start_L, at_L, chain_Q, after_Q = moved_together(
        [place_T, last_L, start_L, at_L, chain_Q, after_Q], device
    )
    text_LT = (place_T >= start_L[:, None]) & (place_T <= last_L[:, None])
    own_QQ = (chain_Q[:, None] == chain_Q) & (after_Q[:, None] >= after_Q)
    own_LQ = torch.nn.functional.pad(own_QQ, (0, 0, len(place_T), 0))
    return Layout(at_L, torch.cat([text_LT, own_LQ], 1))


@torch.no_grad()
def proposals(
    draft: Any, sample: Sample, anchor_R: Tensor, steps: int,
    choose: Callable[[int, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Tokens [K, R] of chains after some positions, each chosen after those before it.

    Args:
        draft: the stand-alone draft.
        sample: packed conversations.
        anchor_R: the positions.
        steps: tokens of each chain.
        choose: (step, logits [R, D]) -> tokens [R].
    """
    draft.model.eval()  # while training, a layer that is checkpointed takes no cache
    places = layout(sample.lengths, anchor_R, steps, sample.ids_T.device)
    weight_DH = draft.model.get_output_embeddings().weight.to(draft.compute_dtype)
    tokens: list[Tensor] = []
    state_RH = places.read(draft, sample.ids_T)[moved(anchor_R, sample.ids_T.device)]
    for step in range(steps):
        if step:
            state_RH = places.read(draft, tokens[-1])
        tokens.append(choose(step, (state_RH @ weight_DH.T).float()))
    return torch.stack(tokens)


def chain_states(draft: Any, sample: Sample, replay: Replay, chains: ReplayChains) -> list[Tensor]:
    """The states that choose each step's tokens, of the chains that count: [rows, H] of each."""
    device, steps = sample.ids_T.device, len(replay.tokens_KR)
    places = layout(sample.lengths, replay.anchor_R, steps, device)
    proposed_Q = moved(replay.tokens_KR[:-1].flatten(), device)
    state_LH = places.read(draft, torch.cat([sample.ids_T, proposed_Q]))
    first, number = len(sample.ids_T), len(replay.anchor_R)
    at_KR = torch.cat([replay.anchor_R, first + torch.arange(len(proposed_Q))]).view(-1, number)
    ordered = moved(at_KR[:, chains.chain_R], device)
    return [state_LH[at_R[:rows]] for at_R, rows in zip(ordered, chains.counts, strict=True)]
