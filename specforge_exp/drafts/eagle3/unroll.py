"""The training forward of EAGLE-3: the draft is fed its own states, step after step.

It computes what `Eagle3Model.project` and `finish` compute, for the rows that a loss can reach
and no others. The embedding's half of q, k and v depends on the token alone: it is made once per
position and read by every step. Step 0 gives keys and values to every position; states and queries
exist for carried rows only.

Shape suffixes: T packed tokens, R carried rows, H hidden, A = 3 H, M key-value heads, E head size,
X heads * E, P rotary positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specforge_exp.drafts.chain_attention import chain_attention, rotate
from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.layers import linear, norm_linear, swiglu_down
from specforge_exp.drafts.rows import Chains


class Shared(NamedTuple):
    """What every step reads."""

    by_token: tuple[Tensor, ...]
    """The embedding's half of q, k and v per position, [T + 1, X] each; the last row is token 0."""
    cos_PE: Tensor
    sin_PE: Tensor
    keys: tuple[Tensor, Tensor]
    """Step-0 keys (rotated) and values, [T, M, E] each."""


def unroll(draft: Eagle3Model, chains: Chains, ids_T: Tensor, aux_TA: Tensor) -> list[Tensor]:
    """Un-normed states [R_k, H] of the carried rows after every step.

    With `draft.gradient_checkpointing` a step keeps its input, its own keys and values, and is
    computed again in the backward pass; no number changes.
    """
    state_TH = linear(aux_TA.to(draft.compute_dtype), draft.fc.weight)
    shared = make_shared(draft, chains, ids_T, state_TH)
    state_RH = state_TH[chains.slot_R]
    states: list[Tensor] = []
    own: list[tuple[Tensor, Tensor]] = []
    for index, rows in enumerate(chains.counts):
        state_RH = state_RH[:rows]
        if rows:
            earlier = [(k_RME[:rows], v_RME[:rows]) for k_RME, v_RME in own]
            arguments = (draft, chains, index, shared, state_RH, earlier)
            if draft.gradient_checkpointing and torch.is_grad_enabled():
                state_RH, *pair = checkpoint(step, *arguments, use_reentrant=False)
            else:
                state_RH, *pair = step(*arguments)
            if index:
                own.append((pair[0], pair[1]))
        states.append(state_RH)
    return states


def make_shared(draft: Eagle3Model, chains: Chains, ids_T: Tensor, state_TH: Tensor) -> Shared:
    """The embedding's half of the projections, the rotary angles, the step-0 keys and values."""
    attn, layer = draft.midlayer.self_attn, draft.midlayer
    embedded = F.embedding(F.pad(ids_T, (0, 1)), draft.embed_VH).to(state_TH.dtype)
    weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    H = embedded.shape[-1]
    by_token = norm_linear(embedded, layer.input_layernorm, slice(0, H), *weights)
    reach_P = torch.arange(max(chains.lengths) + len(chains.counts), device=ids_T.device)
    cos_1PE, sin_1PE = draft.rotary(embedded.float(), reach_P[None])
    k_TX, v_TX = norm_linear(state_TH, layer.hidden_norm, slice(H, None), *weights[1:])
    slot_T = torch.arange(len(ids_T), device=ids_T.device)
    reads_T = torch.where(slot_T + 1 < chains.end_T, slot_T + 1, len(ids_T))
    shape, at_T = (-1, draft.config.head_dim), slot_T - chains.start_T
    k_TME = (k_TX + by_token[1][reads_T]).unflatten(-1, shape)
    v_TME = (v_TX + by_token[2][reads_T]).unflatten(-1, shape)
    return Shared(
        by_token,
        cos_1PE[0],
        sin_1PE[0],
        (rotate(k_TME, cos_1PE[0, at_T], sin_1PE[0, at_T]), v_TME),
    )


def step(
    draft: Eagle3Model,
    chains: Chains,
    index: int,
    shared: Shared,
    state_RH: Tensor,
    earlier: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """One pass of the layer over the rows of a step: the next state, own keys and values.

    Step 0 has no keys of its own: its rows find them among the shared ones.

    Args:
        draft: the weights.
        chains: the rows.
        index: which step.
        shared: see `Shared`.
        state_RH: the states that the rows are fed.
        earlier: the rows' own keys and values of steps 1..index - 1.
    """
    attn, layer = draft.midlayer.self_attn, draft.midlayer
    rows, reads_R = len(state_RH), chains.reads(index)
    weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    used = weights if index else weights[:1]
    halves = norm_linear(state_RH, layer.hidden_norm, slice(state_RH.shape[-1], None), *used)
    at_R = chains.slot_R[:rows] - chains.start_T[chains.slot_R[:rows]] + index
    cos_RE, sin_RE = shared.cos_PE[at_R], shared.sin_PE[at_R]
    q_RNE, *pair = (
        (half_RX + token_TX[reads_R]).unflatten(-1, (-1, draft.config.head_dim))
        for half_RX, token_TX in zip(halves, shared.by_token, strict=False)
    )
    if pair:
        pair = [rotate(pair[0], cos_RE, sin_RE), pair[1]]
        earlier = [*earlier, (pair[0], pair[1])]
    attended_RNE = chain_attention(
        chains.seen[index],
        rotate(q_RNE, cos_RE, sin_RE),
        shared.keys,
        [k_RME for k_RME, _ in earlier],
        [v_RME for _, v_RME in earlier],
    )
    state_RH = state_RH + linear(attended_RNE.flatten(1), attn.o_proj.weight)
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    gate_RI, up_RI = norm_linear(
        state_RH, norm, slice(None), mlp.gate_proj.weight, mlp.up_proj.weight
    )
    return state_RH + swiglu_down(gate_RI, up_RI, mlp.down_proj.weight), *pair
