"""The training forward of EAGLE-3: the draft is fed its own states, step after step.

It computes what `Eagle3Model.project` and `finish` compute, for the rows that a loss can reach
and no others. The embedding's half of q, k and v depends on the token alone: it is made once per
position and read by every step. Step 0 gives keys and values to every position; queries and states
of the last layer exist for carried rows only.

Shape suffixes: T packed tokens, R carried rows, H hidden, A = 3 H, M key-value heads, E head size,
X heads * E, P rotary positions or tokens.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specforge_exp.drafts.chain_attention import (
    LayerStep,
    OwnKeys,
    Visible,
    chain_attention,
    turned_keys,
    visible,
)
from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.layers import IN_ORDER, linear, norm_linear, normed, swiglu_down
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

    number: int
    reads_R: Tensor
    """Position of the token that each reads, T for the token outside."""
    angles: tuple[Tensor, Tensor]
    """cos and sin [R, E] of their places, the first half of the sines negative."""
    seen: dict[int | None, Visible]
    """By the window of a layer."""


class Carried(NamedTuple):
    """Where all rows stand, on the draft's device."""

    slot_R: Tensor
    every: StepRows
    """Every position at step 0; seen by layers before the last."""
    steps: list[StepRows]


class Shared(NamedTuple):
    """What every step of a layer reads."""

    number: int
    by_token: Tensor | None
    """The first layer's: the embedding's half of q, k and v per position, [T + 1, X]; the last row
    is the token outside. Then those of `Fed.more_P` and `Fed.extend`."""
    kv_2TME: Tensor
    """Step-0 keys (rotated) and values."""
    own: OwnKeys
    queries: Tensor | None = None
    """The part of `by_token` that step 0 reads."""
    tokens: tuple[Tensor, ...] = ()
    """What the rows of the steps from 1 on read of `by_token`, where it is taken at once."""


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
    carried = carry(draft, chains, fed, state_TH)
    ids_P = F.pad(ids_T, (0, 1), value=fed.token)
    ids_P = ids_P if fed.more_P is None else torch.cat([ids_P, fed.more_P])
    by_token: Tensor | None = token_halves(draft, ids_P, dtype)
    assert by_token is not None
    sizes = [len(draft.midlayer.self_attn.q_proj.weight), -1]
    sizes[1] = by_token.shape[1] - sizes[0]
    parts: Any = by_token.split(sizes, 1)
    room = 2, len(chains.counts) - 1, chains.counts[min(1, len(chains.counts) - 1)]
    shared: list[Shared] = []
    before: list[Tensor | None] = []
    for number in range(len(draft.stack)):
        if number:
            by_token, parts = None, (None, None)
            state_TH, before[-1] = run(draft, carried.every, shared[-1], state_TH, None)
        kv_2TME = make_shared(draft, carried.every, parts[1], state_TH, number)
        own = OwnKeys(kv_2TME.new_empty(*room, *kv_2TME.shape[2:]))
        shared.append(Shared(number, by_token, kv_2TME, own, parts[0]))
        before.append(None)
    if not (IN_ORDER[ids_T.device.type] or fed.extend or draft.gradient_checkpointing):
        shared[0] = with_tokens(shared[0], carried.steps[1:])
    state_RH = state_TH[carried.slot_R]
    states: list[Tensor] = []
    for index, rows in enumerate(chains.counts):
        if index:
            state_RH = state_RH if rows == len(state_RH) else state_RH[:rows]
            state_RH = draft.recycled(state_RH) if fed_1H is None else fed_1H[:rows]
        for layer in shared if index else shared[-1:]:
            if rows:
                at = layer.number
                state_RH, before[at] = run(draft, carried.steps[index], layer, state_RH, before[at])
        states.append(state_RH)
        if fed.extend:
            more = token_halves(draft, fed.extend(index, state_RH), dtype)
            assert shared[0].by_token is not None
            shared[0] = shared[0]._replace(by_token=torch.cat([shared[0].by_token, more]))
    return states


def with_tokens(shared: Shared, steps: list[StepRows]) -> Shared:
    """Take what all steps read together: one operator, and one in the backward pass."""
    if shared.by_token is None or not steps:
        return shared
    tokens_QX = shared.by_token[torch.cat([rows.reads_R for rows in steps])]
    return shared._replace(tokens=tokens_QX.split([len(rows.reads_R) for rows in steps]))


def run(
    draft: Eagle3Model[Any],
    rows: StepRows,
    shared: Shared,
    state_RH: Tensor,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`step`, or its checkpoint."""
    arguments = (draft, rows, shared, state_RH, before)
    if draft.gradient_checkpointing and torch.is_grad_enabled():
        out: tuple[Tensor, Tensor] = checkpoint(step, *arguments, use_reentrant=False)
        return out
    return step(*arguments)


def carry(draft: Eagle3Model[Any], chains: Chains, fed: Fed, like: Tensor) -> Carried:
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
    at_Q = torch.cat([at_T[slot_R] + index for slot_R, _, index, _ in passes])
    numbers, sights = [chains.slot_R, slot_T, at_Q], []
    for slot_R, reads_R, index, kinds in passes:
        numbers.append(reads_R)
        for window in dict.fromkeys(kinds):
            first_R = None
            if window is not None:
                first_R = slot_R + (index if fed.windows_move else 0) + 1 - window
            sights.append(visible(slot_R, chains.start_T[slot_R], like, first_R))
            numbers += sights[-1].numbers
    moved, seen = iter(moved_together(numbers, like.device)), iter(sights)
    slot_R, slot_T, reach = next(moved), next(moved), max(chains.lengths) + len(chains.counts)
    angles = rotation(draft, reach, like, next(moved), [len(slot_R) for slot_R, *_ in passes])
    first, *steps = (
        StepRows(
            index,
            next(moved),
            next(angles),
            {window: next(seen).there(moved, slot_T) for window in dict.fromkeys(kinds)},
        )
        for _, _, index, kinds in passes
    )
    return Carried(slot_R, first, steps)


def rotation(
    draft: Eagle3Model[Any], reach: int, like: Tensor, at_Q: Tensor, sizes: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rotary angles of places below `reach`, cut into parts; the first half of the sines is
    negative."""
    reach_P = torch.arange(reach, device=like.device)
    cos_1PE, sin_1PE = draft.rotary(like.float(), reach_P[None])
    sin_1PE[..., : sin_1PE.shape[-1] // 2].neg_()
    return zip(cos_1PE[0, at_Q].split(sizes), sin_1PE[0, at_Q].split(sizes), strict=True)


def token_halves(draft: Eagle3Model[Any], ids_P: Tensor, dtype: torch.dtype) -> Tensor:
    """The embedding's half of the first layer's projections, side by side."""
    attn, norm = draft.midlayer.self_attn, draft.midlayer.input_layernorm
    embedded = F.embedding(ids_P, draft.embed_VH).to(dtype)
    weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    return norm_linear(embedded, norm, slice(0, embedded.shape[-1]), *weights)


def make_shared(
    draft: Eagle3Model[Any],
    every: StepRows,
    by_token: Tensor | None,
    state_TH: Tensor,
    number: int,
) -> Tensor:
    """The step-0 keys and values of a layer that is given these states."""
    layer = draft.stack[number]
    attn, columns = layer.self_attn, slice(-state_TH.shape[-1], None)
    weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    kv_TX = norm_linear(state_TH, layer.state_norm, columns, *weights, which=slice(1, 3))
    if by_token is not None:
        kv_TX = kv_TX + by_token[every.reads_R]
    return turned_keys(kv_TX, every.angles)


def step(
    draft: Eagle3Model[Any],
    rows: StepRows,
    shared: Shared,
    state_RH: Tensor,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One pass of a layer over the rows of a step: the next state, and the next `before`.

    Args:
        draft: the weights.
        rows: the rows.
        shared: see `Shared`.
        state_RH: the states that the rows are fed; one row, where all are fed the same.
        before: see `chain_attention`.
    """
    layer = draft.stack[shared.number]
    attn, mlp = layer.self_attn, layer.mlp
    weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    used, columns = slice(None if rows.number else 1), slice(-state_RH.shape[-1], None)
    half_RX = norm_linear(state_RH, layer.state_norm, columns, *weights, which=used)
    token_RX = None
    if shared.tokens and rows.number:
        token_RX = shared.tokens[rows.number - 1]
    elif shared.by_token is not None:
        source = shared.by_token if rows.number or shared.queries is None else shared.queries
        token_RX = source[rows.reads_R]
    if layer.first and draft.variant.norm_before_residual:
        state_RH = normed(state_RH, layer.hidden_norm)
    seen = rows.seen[draft.variant.windows[shared.number]]
    turn = LayerStep(seen, rows.angles, shared.own, rows.number)
    attended_RX, before = chain_attention(turn, shared.kv_2TME, half_RX, token_RX, before)
    state_RH = state_RH + linear(attended_RX, attn.o_proj.weight)
    norm = layer.post_attention_layernorm
    both_RI = norm_linear(state_RH, norm, slice(None), mlp.gate_proj.weight, mlp.up_proj.weight)
    return state_RH + swiglu_down(both_RI, mlp.down_proj.weight), before
