"""The training forward of EAGLE-3: the draft is fed its own states, step after step.

It computes what `Eagle3Model.project` and `finish` compute, for the rows that a loss can reach
and no others. The embedding's half of q, k and v depends on the token alone: it is made once per
position and read by every step. Step 0 gives keys and values to every position; states and queries
exist for carried rows only.

Shape suffixes: T packed tokens, R carried rows, H hidden, A = 3 H, M key-value heads, E head size,
X heads * E, P rotary positions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specforge_exp.drafts.chain_attention import Visible, chain_attention, rotate, visible
from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.layers import linear, norm_linear, swiglu_down
from specforge_exp.drafts.rows import Chains
from specforge_exp.training.batches import moved_together


class StepRows(NamedTuple):
    """The rows of a step, on the draft's device."""

    reads_R: Tensor
    """Position of the token that each reads, T for token 0."""
    at_R: Tensor
    """Its place in the conversation, for the rotation."""
    seen: Visible


class Carried(NamedTuple):
    """Where all rows stand, on the draft's device."""

    slot_R: Tensor
    reads_T: Tensor
    """Position of the token after each, T for token 0."""
    at_T: Tensor
    """Place in its conversation."""
    steps: list[StepRows]


class Shared(NamedTuple):
    """What every step reads."""

    by_token: tuple[Tensor, ...]
    """The embedding's half of q, k and v per position, [T + 1, X] each; the last row is token 0."""
    cos_PE: Tensor
    sin_PE: Tensor
    keys: tuple[Tensor, Tensor]
    """Step-0 keys (rotated) and values, [T, M, E] each."""


def unroll(
    draft: Eagle3Model,
    chains: Chains,
    ids_T: Tensor,
    aux_TA: Tensor,
    more_P: Tensor | None = None,
    extend: Callable[[int, Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Un-normed states [R_k, H] of the carried rows after every step.

    Tokens that are not of the text have the numbers from T + 1 on: those of `more_P`, then those
    that `extend` makes of the states of a step, for the next one to read.

    With `draft.gradient_checkpointing` a step keeps its input, its own keys and values, and is
    computed again in the backward pass; no number changes.
    """
    state_TH = linear(aux_TA.to(draft.compute_dtype), draft.fc.weight)
    carried = carry(chains, ids_T.device)
    reach = max(chains.lengths) + len(chains.counts)
    ids_P = F.pad(ids_T, (0, 1)) if more_P is None else torch.cat([F.pad(ids_T, (0, 1)), more_P])
    shared = make_shared(draft, carried, ids_P, state_TH, reach)
    state_RH = state_TH[carried.slot_R]
    states: list[Tensor] = []
    own: list[tuple[Tensor, Tensor]] = []
    for index, rows in enumerate(chains.counts):
        state_RH = state_RH[:rows]
        if rows:
            earlier = [(k_RME[:rows], v_RME[:rows]) for k_RME, v_RME in own]
            arguments = (draft, carried.steps[index], index > 0, shared, state_RH, earlier)
            if draft.gradient_checkpointing and torch.is_grad_enabled():
                state_RH, *pair = checkpoint(step, *arguments, use_reentrant=False)
            else:
                state_RH, *pair = step(*arguments)
            if index:
                own.append((pair[0], pair[1]))
        states.append(state_RH)
        if extend:
            more = halves_by_token(draft, extend(index, state_RH), state_RH.dtype)
            pairs = zip(shared.by_token, more, strict=True)
            shared = shared._replace(by_token=tuple(torch.cat(pair) for pair in pairs))
    return states


def halves_by_token(draft: Eagle3Model, ids_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The embedding's half of q, k and v of some tokens, [P, X] each."""
    attn, layer = draft.midlayer.self_attn, draft.midlayer
    embedded = F.embedding(ids_P, draft.embed_VH).to(dtype)
    weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    return norm_linear(embedded, layer.input_layernorm, slice(0, embedded.shape[-1]), *weights)


def carry(chains: Chains, device: torch.device) -> Carried:
    """What the draft reads of its rows, in one copy."""
    slot_T = torch.arange(len(chains.start_T))
    at_T = slot_T - chains.start_T
    reads_T = torch.where(slot_T + 1 < chains.end_T, slot_T + 1, len(slot_T))
    slots = [chains.slot_R[:rows] for rows in chains.counts]
    seen = [visible(slot_R, chains.start_T[slot_R], device) for slot_R in slots]
    numbers = [chains.slot_R, reads_T, at_T]
    for index, slot_R in enumerate(slots):
        order_R, ordered_R, _ = seen[index]
        numbers += [chains.reads(index), at_T[slot_R] + index, order_R, ordered_R]
    slot_R, reads_T, at_T, *rest = moved_together(numbers, device)
    steps = [
        StepRows(rest[i], rest[i + 1], Visible(rest[i + 2], rest[i + 3], seen[i // 4].blocks))
        for i in range(0, len(rest), 4)
    ]
    return Carried(slot_R, reads_T, at_T, steps)


def make_shared(
    draft: Eagle3Model, carried: Carried, ids_P: Tensor, state_TH: Tensor, reach: int
) -> Shared:
    """The embedding's half of the projections, the rotary angles of the first `reach` places, the
    step-0 keys and values."""
    attn, layer = draft.midlayer.self_attn, draft.midlayer
    by_token = halves_by_token(draft, ids_P, state_TH.dtype)
    reach_P = torch.arange(reach, device=ids_P.device)
    cos_1PE, sin_1PE = draft.rotary(state_TH.float(), reach_P[None])
    weights = (attn.k_proj.weight, attn.v_proj.weight)
    k_TX, v_TX = norm_linear(state_TH, layer.hidden_norm, slice(state_TH.shape[-1], None), *weights)
    shape, reads_T, at_T = (-1, draft.config.head_dim), carried.reads_T, carried.at_T
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
    rows: StepRows,
    own: bool,
    shared: Shared,
    state_RH: Tensor,
    earlier: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """One pass of the layer over the rows of a step: the next state, own keys and values.

    Step 0 has no keys of its own: its rows find them among the shared ones.

    Args:
        draft: the weights.
        rows: the rows.
        own: whether they have keys of their own: not at step 0.
        shared: see `Shared`.
        state_RH: the states that the rows are fed.
        earlier: the rows' own keys and values of the steps from 1 to the one before.
    """
    attn, layer = draft.midlayer.self_attn, draft.midlayer
    weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    used = weights if own else weights[:1]
    halves = norm_linear(state_RH, layer.hidden_norm, slice(state_RH.shape[-1], None), *used)
    cos_RE, sin_RE = shared.cos_PE[rows.at_R], shared.sin_PE[rows.at_R]
    q_RNE, *pair = (
        (half_RX + token_TX[rows.reads_R]).unflatten(-1, (-1, draft.config.head_dim))
        for half_RX, token_TX in zip(halves, shared.by_token, strict=False)
    )
    if pair:
        pair = [rotate(pair[0], cos_RE, sin_RE), pair[1]]
        earlier = [*earlier, (pair[0], pair[1])]
    attended_RNE = chain_attention(
        rows.seen,
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
