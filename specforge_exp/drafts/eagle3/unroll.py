"""The training forward of EAGLE-3: the draft is fed its own states, step after step.

It computes what `Eagle3Model.project` and `finish` compute, for the rows that a loss can reach
and no others. The embedding's half of q, k and v depends on the token alone: it is made once per
position and read by every step. Step 0 gives keys and values to every position; queries and states
of the last layer exist for carried rows only.

Shape suffixes: T packed tokens, R carried rows, H hidden, A = 3 H, M key-value heads, E head size,
X heads * E, P rotary positions or tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specforge_exp.drafts.chain_attention import Visible, chain_attention, rotate, visible
from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.layers import linear, norm_linear, normed, swiglu_down
from specforge_exp.drafts.rows import Chains
from specforge_exp.training.batches import moved_together


class Fed(NamedTuple):
    """What the steps are fed, where that is not the text and the step before."""

    token: int = 0
    """Stands for tokens outside the conversation."""
    aux_1A: Tensor | None = None
    """With `token`, what all steps but the first read, in the place of the target's states: none
    depends on another's outcome, as in P-EAGLE."""
    windows_move: bool = True
    """Whether a window ends with the row's position, as when serving, or with its slot."""
    more_P: Tensor | None = None
    """Tokens that are not of the text; rows read them by the numbers from T + 1 on."""
    extend: Callable[[int, Tensor], Tensor] | None = None
    """Makes further ones of the states of a step, for the next one to read."""


class StepRows(NamedTuple):
    """The rows of a step, on the draft's device."""

    reads_R: Tensor
    """Position of the token that each reads, T for the token outside."""
    at_R: Tensor
    """Its place in the conversation, for the rotation."""
    seen: dict[int | None, Visible]
    """By the window of a layer."""
    own: bool
    """Whether they have keys of their own: not at step 0, whose keys all positions share."""


class Carried(NamedTuple):
    """Where all rows stand, on the draft's device."""

    slot_R: Tensor
    every: StepRows
    """Every position at step 0; seen by layers before the last."""
    steps: list[StepRows]


class Shared(NamedTuple):
    """What every step of a layer reads."""

    number: int
    by_token: tuple[Tensor, ...]
    """The first layer's: the embedding's half of q, k and v per position, [T + 1, X] each; the last
    row is the token outside. Then those of `Fed.more_P` and `Fed.extend`."""
    angles: tuple[Tensor, Tensor]
    """cos and sin, [P, E] each."""
    keys: tuple[Tensor, Tensor]
    """Step-0 keys (rotated) and values, [T, M, E] each."""


def unroll(
    draft: Eagle3Model[Any], chains: Chains, ids_T: Tensor, aux_TA: Tensor, fed: Fed | None = None
) -> list[Tensor]:
    """Un-normed states [R_k, H] of the carried rows after every step.

    With `draft.gradient_checkpointing` a layer of a step keeps its input, its own keys and values,
    and is computed again in the backward pass; no number changes.
    """
    fed = fed or Fed()
    dtype, fc = draft.compute_dtype, draft.fc.weight
    state_TH = linear(draft.read(aux_TA.to(dtype)), fc)
    fed_1H = None if fed.aux_1A is None else linear(draft.read(fed.aux_1A.to(dtype)), fc)
    carried = carry(draft, chains, fed, ids_T.device)
    angles = rotation(draft, max(chains.lengths) + len(chains.counts), state_TH)
    ids_P = F.pad(ids_T, (0, 1), value=fed.token)
    ids_P = ids_P if fed.more_P is None else torch.cat([ids_P, fed.more_P])
    by_token = token_halves(draft, ids_P, dtype)
    shared: list[Shared] = []
    for number in range(len(draft.stack)):
        if number:
            by_token, (state_TH,) = (), run(draft, carried.every, shared[-1], state_TH, [])
        shared.append(make_shared(draft, carried.every, by_token, angles, state_TH, number))
    state_RH = state_TH[carried.slot_R]
    states: list[Tensor] = []
    own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in shared]
    for index, rows in enumerate(chains.counts):
        if index:
            state_RH = draft.recycled(state_RH[:rows]) if fed_1H is None else fed_1H[:rows]
        for layer in shared if index else shared[-1:]:
            if rows:
                mine = own[layer.number]
                earlier = [(k_RME[:rows], v_RME[:rows]) for k_RME, v_RME in mine]
                state_RH, *pair = run(draft, carried.steps[index], layer, state_RH, earlier)
                mine += [(pair[0], pair[1])] if index else []
        states.append(state_RH)
        if fed.extend:
            more = token_halves(draft, fed.extend(index, state_RH), dtype)
            pairs = zip(shared[0].by_token, more, strict=True)
            shared[0] = shared[0]._replace(by_token=tuple(torch.cat(pair) for pair in pairs))
    return states


def run(
    draft: Eagle3Model[Any],
    rows: StepRows,
    shared: Shared,
    state_RH: Tensor,
    earlier: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """`step`, or its checkpoint."""
    arguments = (draft, rows, shared, state_RH, earlier)
    if draft.gradient_checkpointing and torch.is_grad_enabled():
        out: tuple[Tensor, ...] = checkpoint(step, *arguments, use_reentrant=False)
        return out
    return step(*arguments)


def carry(draft: Eagle3Model[Any], chains: Chains, fed: Fed, device: torch.device) -> Carried:
    """What the draft reads of its rows, in one copy."""
    slot_T = torch.arange(len(chains.start_T))
    outside, windows = len(slot_T), draft.variant.windows
    at_T = slot_T - chains.start_T
    every = (slot_T, torch.where(slot_T + 1 < chains.end_T, slot_T + 1, outside), 0, windows[:-1])
    passes = [every]
    for index, rows in enumerate(chains.counts):
        reads_R = chains.reads(index)
        if index and fed.aux_1A is not None:
            reads_R = torch.full_like(reads_R, outside)
        passes.append((chains.slot_R[:rows], reads_R, index, windows if index else windows[-1:]))
    numbers, blocks = [chains.slot_R], []
    for slot_R, reads_R, index, kinds in passes:
        numbers += [reads_R, at_T[slot_R] + index]
        for window in dict.fromkeys(kinds):
            first_R = None
            if window is not None:
                first_R = slot_R + (index if fed.windows_move else 0) + 1 - window
            seen = visible(slot_R, chains.start_T[slot_R], device, first_R)
            blocks.append(seen.blocks)
            numbers += [seen.order_R, seen.slot_R]
            numbers += [] if seen.first_R is None else [seen.first_R]
    moved, cut = iter(moved_together(numbers, device)), iter(blocks)
    slot_R = next(moved)
    first, *steps = (
        StepRows(
            next(moved),
            next(moved),
            {
                window: Visible(
                    next(moved), next(moved), next(cut), None if window is None else next(moved)
                )
                for window in dict.fromkeys(kinds)
            },
            index > 0,
        )
        for _, _, index, kinds in passes
    )
    return Carried(slot_R, first, steps)


def rotation(draft: Eagle3Model[Any], reach: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary angles of the first `reach` places."""
    reach_P = torch.arange(reach, device=like.device)
    cos_1PE, sin_1PE = draft.rotary(like.float(), reach_P[None])
    return cos_1PE[0], sin_1PE[0]


def token_halves(draft: Eagle3Model[Any], ids_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The embedding's half of the first layer's projections."""
    attn, norm = draft.midlayer.self_attn, draft.midlayer.input_layernorm
    embedded = F.embedding(ids_P, draft.embed_VH).to(dtype)
    weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    return norm_linear(embedded, norm, slice(0, embedded.shape[-1]), *weights)


def make_shared(
    draft: Eagle3Model[Any],
    every: StepRows,
    by_token: tuple[Tensor, ...],
    angles: tuple[Tensor, Tensor],
    state_TH: Tensor,
    number: int,
) -> Shared:
    """The step-0 keys and values of a layer that is given these states."""
    layer, shape = draft.stack[number], (-1, draft.config.head_dim)
    weights = (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight)
    pair = norm_linear(state_TH, layer.state_norm, slice(-state_TH.shape[-1], None), *weights)
    if by_token:
        pair = (pair[0] + by_token[1][every.reads_R], pair[1] + by_token[2][every.reads_R])
    k_TME, v_TME = (x.unflatten(-1, shape) for x in pair)
    cos_TE, sin_TE = (x_PE[every.at_R] for x_PE in angles)
    return Shared(number, by_token, angles, (rotate(k_TME, cos_TE, sin_TE), v_TME))


def step(
    draft: Eagle3Model[Any],
    rows: StepRows,
    shared: Shared,
    state_RH: Tensor,
    earlier: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """One pass of a layer over the rows of a step: the next state, own keys and values.

    Args:
        draft: the weights.
        rows: the rows.
        shared: see `Shared`.
        state_RH: the states that the rows are fed; one row, where all are fed the same.
        earlier: the rows' own keys and values of the steps from 1 to the one before.
    """
    layer = draft.stack[shared.number]
    attn, mlp = layer.self_attn, layer.mlp
    weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    used = weights if rows.own else weights[:1]
    halves = norm_linear(state_RH, layer.state_norm, slice(-state_RH.shape[-1], None), *used)
    if shared.by_token:
        pairs = zip(halves, shared.by_token, strict=False)
        halves = tuple(half_RX + token_TX[rows.reads_R] for half_RX, token_TX in pairs)
    if layer.first and draft.variant.norm_before_residual:
        state_RH = normed(state_RH, layer.hidden_norm)
    cos_RE, sin_RE = (x_PE[rows.at_R] for x_PE in shared.angles)
    q_RNE, *pair = (half_RX.unflatten(-1, (-1, draft.config.head_dim)) for half_RX in halves)
    if pair:
        pair = [rotate(pair[0], cos_RE, sin_RE), pair[1]]
        earlier = [*earlier, (pair[0], pair[1])]
    attended_RNE = chain_attention(
        rows.seen[draft.variant.windows[shared.number]],
        rotate(q_RNE, cos_RE, sin_RE),
        shared.keys,
        [k_RME for k_RME, _ in earlier],
        [v_RME for _, v_RME in earlier],
    )
    state_RH = state_RH + linear(attended_RNE.flatten(1), attn.o_proj.weight)
    norm = layer.post_attention_layernorm
    gate_RI, up_RI = norm_linear(
        state_RH, norm, slice(None), mlp.gate_proj.weight, mlp.up_proj.weight
    )
    return state_RH + swiglu_down(gate_RI, up_RI, mlp.down_proj.weight), *pair
