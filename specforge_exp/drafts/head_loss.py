"""The draft's head and its loss in one pass: logits exist for some rows at a time, never twice.

Positions of the target come in blocks; all rows of all steps that a block's positions teach are
taken together, so the target's distribution is made once per position. Losses, metrics and
gradients of a row come from one visit to its logits; the head's and the norm's gradients go into
`.grad`, those of the states are kept for the backward pass.

Shape suffixes: Q supervised rows of all steps, N rows of a chunk, T tokens, P positions, R rows of
step 0, K steps, H hidden, D draft vocabulary, V target vocabulary, F rank of an addition.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from specforge_exp.drafts.kernels import USED
from specforge_exp.drafts.layers import RMSNorm, add_product
from specforge_exp.drafts.outcome import RowSums, by_conversation, reported
from specforge_exp.drafts.rows import Chains, Rows
from specforge_exp.drafts.teacher import Teacher, make_teacher
from specforge_exp.drafts.weighting import Weighting
from specforge_exp.losses import TeacherRows, acceptance_rate, opd_closed
from specforge_exp.target import Head
from specforge_exp.training.objective import Outcome

POSITIONS = {"cpu": 512, "cuda": 2048}
"""Positions of the target whose distribution is held together."""
LOGITS = {"cpu": 2**25, "cuda": 2**27}
"""Logits of the draft held together."""
BLOCK = {"cpu": 2**19, "cuda": 2**28}
"""Logits that one round of element-wise operations visits; on a CPU they should fit its cache."""
TILE = {"cpu": 2**20, "cuda": 2**62}
"""Weights of the head that one product takes: with few rows a CPU is faster when it keeps them."""


@dataclass(frozen=True)
class Heads:
    """Both models' heads and what the target's reads."""

    norm: RMSNorm
    weight_DH: Tensor
    draft_ids_D: Tensor
    target: Head
    last_TH: Tensor
    """The target's post-norm last hidden states."""
    next_T: Tensor
    """The token after each position, in the draft's vocabulary (any where it has none)."""
    host_ids_D: Tensor | None = None
    """`draft_ids_D` on the CPU; None: to be fetched."""


@dataclass(frozen=True)
class Addition:
    """A product of low rank that is added to the draft's logits: feature times weight."""

    feature_QF: Tensor
    """A factor for every state, in their order; it gets its gradient in the backward pass."""
    weight_DF: Tensor
    """Its gradient is added to `.grad` at once, as the head's."""


@dataclass(frozen=True)
class Pass:
    """What every chunk of a pass over all rows reads, and what it adds to."""

    rows: Rows
    state_QH: Tensor
    """Un-normed states of all steps, one step after the other."""
    heads: Heads
    weighting: Weighting
    sums: RowSums
    gradient_QH: Tensor | None
    """Gradient of the states; None: none are made."""
    buffer_ND: Tensor
    """Room for the logits of a chunk."""
    addition: Addition | None = None
    gradient_QF: Tensor | None = None
    """Gradient of the addition's feature."""


def head_and_loss(
    chains: Chains,
    states: list[Tensor],
    heads: Heads,
    weighting: Weighting,
    along: Callable[[RowSums], RowSums] | None = None,
    addition: Addition | None = None,
) -> Outcome:
    """The loss over every supervised row; with its gradients, where torch makes any.

    Those of the head and its norm are added to `.grad` at once, those of the states are what
    `loss.backward()` starts from.

    Args:
        chains: which rows there are.
        states: un-normed states [R_k, H] of every step.
        heads: both heads.
        weighting: the loss.
        along: the acceptance rates that the simulated length is made of, where they are not those
            of the rows' own steps.
        addition: to the draft's logits.
    """
    gradient = torch.is_grad_enabled()
    work = visit_rows(chains, states, heads, weighting, gradient, addition)
    sums, rows = work.sums, len(work.rows.flat_Q)
    chain = along(sums) if along else sums
    step_loss_K = weighting.step_losses(sums.values) / weighting.decay_K
    loss = (step_loss_K * weighting.decay_K).sum()
    if work.gradient_QH is not None:
        loss = attach(loss, work.gradient_QH, states)
    if addition is not None and work.gradient_QF is not None:
        loss = loss + attach(torch.zeros_like(loss), work.gradient_QF, [addition.feature_QF])
    head = 6.0 if heads.weight_DH.requires_grad else 4.0
    flops = head * rows * heads.weight_DH.numel()
    flops += 2.0 * len(work.rows.position_P) * heads.target.weight_VH.numel()
    pairs_B2 = None if gradient else by_conversation(chain, chains)
    return Outcome(loss, step_loss_K, reported(sums, chain), pairs_B2, flops)


@torch.no_grad()
def visit_rows(
    chains: Chains,
    states: list[Tensor],
    heads: Heads,
    weighting: Weighting,
    gradient: bool,
    addition: Addition | None = None,
) -> Pass:
    """Visit every supervised row once, by the positions that teach them; as `head_and_loss`."""
    state_QH = torch.cat(states)
    device = state_QH.device
    rows, positions = chains.rows.on(device), POSITIONS[device.type]
    alpha_KR = torch.zeros(len(states), chains.counts[0], device=device)
    sums = RowSums(alpha_KR, torch.zeros_like(alpha_KR, dtype=torch.bool))
    size = max(1, LOGITS[device.type] // len(heads.weight_DH))
    buffer_ND = logits_buffer(min(size, len(rows.flat_Q)), state_QH, heads.weight_DH)
    gradient_QH = torch.zeros_like(state_QH) if gradient else None
    gradient_QF = torch.zeros_like(addition.feature_QF) if addition and gradient else None
    # One more position stands for all that lies outside a conversation.
    last_TH = torch.cat([heads.last_TH, torch.zeros_like(heads.last_TH[:1])])
    heads = replace(heads, next_T=torch.cat([heads.next_T, heads.next_T[:1]]))
    work = Pass(
        rows, state_QH, heads, weighting, sums, gradient_QH, buffer_ND, addition, gradient_QF
    )
    before = [*rows.before[::positions], len(rows.flat_Q)]
    for index, position_P in enumerate(rows.position_P.split(positions)):
        teacher = make_teacher(
            heads.target, last_TH[position_P], heads.draft_ids_D, weighting.temperature,
            heads.host_ids_D,
        )  # fmt: skip
        listed_N = torch.arange(before[index], before[index + 1], device=device)
        at_N = rows.at_Q[listed_N] - index * positions
        if weighting.drop_unknown:
            sayable_N = teacher.sayable_P[at_N]
            listed_N, at_N = listed_N[sayable_N], at_N[sayable_N]
        chunks = max(1, -(-len(listed_N) // size))
        for chunk_N, chunk_at_N in zip(listed_N.chunk(chunks), at_N.chunk(chunks), strict=True):
            visit_chunk(work, teacher, chunk_N, chunk_at_N)
    sums.add_up()
    return work


def visit_chunk(work: Pass, teacher: Teacher, listed_N: Tensor, at_N: Tensor) -> None:
    """Logits, losses and metrics of some rows, and the products of the logits' gradients.

    Args:
        work: the pass.
        teacher: the target at the positions of these rows.
        listed_N: which of `work.rows`.
        at_N: which of the teacher's positions.
    """
    if not len(listed_N):
        return
    rows, heads, sums = work.rows, work.heads, work.sums
    flat_N, step_N, row_N = rows.flat_Q[listed_N], rows.step_Q[listed_N], rows.row_Q[listed_N]
    state_NH = work.state_QH[flat_N]
    normed_NH = heads.norm(state_NH)
    weight_DH = heads.weight_DH.to(normed_NH.dtype)
    logits_ND = head_logits(normed_NH, weight_DH, work.buffer_ND)
    if work.addition is not None:
        add_to(logits_ND, work.addition, flat_N)
    size = max(1, BLOCK[logits_ND.device.type] // logits_ND.shape[1])
    for block in range(0, len(listed_N), size):
        part = slice(block, block + size)
        values = visit_block(work, logits_ND[part], teacher, listed_N[part], at_N[part])
        sums.add(step_N[part], row_N[part], values)
    sums.counted_KR[step_N, row_N] = True
    if work.gradient_QH is not None:
        narrow_ND = logits_ND.to(normed_NH.dtype)
        add_product(heads.weight_DH, slice(None), narrow_ND, normed_NH)
        if work.addition is not None and work.gradient_QF is not None:
            feature_NF, weight_DF = work.addition.feature_QF[flat_N], work.addition.weight_DF
            add_product(weight_DF, slice(None), narrow_ND, feature_NF)
            work.gradient_QF[flat_N] = narrow_ND @ weight_DF.to(narrow_ND.dtype)
        work.gradient_QH[flat_N] = heads.norm.backward(state_NH, narrow_ND @ weight_DH)


def add_to(logits_ND: Tensor, addition: Addition, flat_N: Tensor) -> None:
    """Add what is added to the logits of these states, in place."""
    feature_NF = addition.feature_QF[flat_N]
    weight_DF = addition.weight_DF.to(feature_NF.dtype)
    width = max(1, TILE[logits_ND.device.type] // weight_DF.shape[1])
    for weight_LF, logits_NL in zip(weight_DF.split(width), logits_ND.split(width, 1), strict=True):
        if logits_NL.dtype == weight_LF.dtype:
            logits_NL.addmm_(feature_NF, weight_LF.T)
        else:
            logits_NL.add_(feature_NF @ weight_LF.T)


@torch.no_grad()
def text_losses(
    chains: Chains, states: list[Tensor], heads: Heads, addition: Addition | None = None
) -> Tensor:
    """-log q of the text's own next token at every row that counts, -1 elsewhere; [K, R] fp32.

    Arguments as in `head_and_loss`; no gradient is made, the target is not asked.
    """
    state_QH, device = torch.cat(states), states[0].device
    rows = chains.rows.on(device)
    loss_KR = torch.full((len(states), chains.counts[0]), -1.0, device=device)
    size = max(1, LOGITS[device.type] // len(heads.weight_DH))
    weight_DH = heads.weight_DH.to(state_QH.dtype)
    buffer_ND = logits_buffer(min(size, len(rows.flat_Q)), state_QH, weight_DH)
    for listed_N in torch.arange(len(rows.flat_Q), device=device).split(size):
        flat_N = rows.flat_Q[listed_N]
        logits_ND = head_logits(heads.norm(state_QH[flat_N]), weight_DH, buffer_ND)
        if addition is not None:
            add_to(logits_ND, addition, flat_N)
        next_N = heads.next_T[rows.position_P[rows.at_Q[listed_N]]]
        picked_N = logits_ND.gather(1, next_N[:, None])[:, 0]
        loss_N = (torch.logsumexp(logits_ND, -1) - picked_N).clamp(min=0)
        loss_KR[rows.step_Q[listed_N], rows.row_Q[listed_N]] = loss_N
    return loss_KR


def logits_buffer(rows: int, state_QH: Tensor, weight_DH: Tensor) -> Tensor:
    """What `head_logits` writes the logits of so many rows to; of narrow states, it needs none."""
    held = rows if state_QH.dtype == torch.float32 else 0
    return torch.empty(held, len(weight_DH), device=state_QH.device)


def head_logits(normed_NH: Tensor, weight_DH: Tensor, buffer_ND: Tensor) -> Tensor:
    """The draft's logits in fp32, in the buffer where that is the states' dtype."""
    if normed_NH.dtype != buffer_ND.dtype:
        return (normed_NH @ weight_DH.T).float()
    logits_ND = buffer_ND[: len(normed_NH)]
    width = max(1, TILE[buffer_ND.device.type] // weight_DH.shape[1])
    tiles = zip(weight_DH.split(width), logits_ND.split(width, 1), strict=True)
    for weight_LH, logits_NL in tiles:
        torch.mm(normed_NH, weight_LH.T, out=logits_NL)
    return logits_ND


def visit_block(
    work: Pass, logits_ND: Tensor, teacher: Teacher, listed_N: Tensor, at_N: Tensor
) -> dict[str, Tensor]:
    """Values per row; the logits become their gradient. As `visit_chunk`."""
    rows, weighting, gradient = work.rows, work.weighting, work.gradient_QH is not None
    best_N = teacher.best_P[at_N]
    top_N = logits_ND.gather(1, best_N[:, None])[:, 0] >= logits_ND.amax(-1)
    metrics = {"top1": (top_N & teacher.sayable_P[at_N]).float()}
    scaled = weighting.temperature != 1.0
    if scaled or weighting.local or weighting.function is not None:
        logq_ND = torch.log_softmax(logits_ND, -1)
        metrics["alpha"] = acceptance_rate(logq_ND, teacher.plain_rows(at_N))
    step_N = rows.step_Q[listed_N]

    def weight(weight_K: Tensor) -> Tensor:
        if weighting.rows_KR is None:
            return weight_K[step_N]
        return weight_K[step_N] * weighting.rows_KR[step_N, rows.row_Q[listed_N]]

    if weighting.function is not None:
        scale_N = weight(weighting.scale_K)
        target = taught(work, teacher, listed_N, at_N)
        values = differentiate(weighting, logits_ND, target, scale_N, gradient)
        if weighting.rows_KR is not None:
            values["loss"] = scale_N * values["loss"]
        return values | metrics
    if scaled:
        logits_ND.div_(weighting.temperature)
    weights = {name: weight(weight_K) for name, weight_K in weighting.terms.items()}
    if logits_ND.device.type in USED:
        from specforge_exp.drafts.kernels.losses import Known, opd_rows

        known = Known(*teacher.shared(at_N, weighting.local), next_of(work, listed_N))
        values = opd_rows(logits_ND, known, weights, weighting.floor, gradient)
    else:
        target = taught(work, teacher, listed_N, at_N)
        values = opd_closed(logits_ND, target, weights, weighting.floor, gradient)
    if weighting.rows_KR is not None:
        values["loss"] = sum((w * values[name] for name, w in weights.items()), 0 * values["alpha"])
    if scaled and gradient:
        logits_ND.div_(weighting.temperature)
    return values | metrics


def next_of(work: Pass, listed_N: Tensor) -> Tensor:
    """The text's next token at these rows, in the draft's vocabulary."""
    return work.heads.next_T[work.rows.position_P[work.rows.at_Q[listed_N]]]


def taught(work: Pass, teacher: Teacher, listed_N: Tensor, at_N: Tensor) -> TeacherRows:
    """The target's distribution at these rows."""
    target = replace(teacher.rows(at_N), next_N=next_of(work, listed_N))
    if work.weighting.local:
        target = replace(target, log_mass_N=torch.zeros_like(target.log_mass_N))
    return target


def differentiate(
    weighting: Weighting,
    logits_ND: Tensor,
    target: TeacherRows,
    scale_N: Tensor,
    gradient: bool,
) -> dict[str, Tensor]:
    """A loss of the user's own, by autograd on these rows."""
    assert weighting.function is not None
    with torch.set_grad_enabled(gradient):
        leaf_ND = logits_ND.detach().clone().requires_grad_(gradient)
        rows = weighting.function(leaf_ND, target)
        if gradient:
            (rows.loss_N * scale_N).sum().backward()
            logits_ND.copy_(leaf_ND.grad if leaf_ND.grad is not None else 0 * logits_ND)
    return {**{k: v.detach() for k, v in rows.parts.items()}, "loss": rows.loss_N.detach()}


class _Attach(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient_QH: Tensor, *states: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_QH)
        ctx.sizes = [len(state) for state in states]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_QH,) = ctx.saved_tensors
        if outer[0].device.type != "cpu":  # to look at the number would be to wait for the GPU
            gradient_QH = gradient_QH.masked_fill(outer[0] != 1, float("nan"))
        elif float(outer[0]) != 1:
            raise RuntimeError(
                f"the loss of a draft was multiplied by {float(outer[0]):g} before backward(): its "
                "head's gradient exists already and cannot be scaled; scale the loss's weights"
            )
        return None, None, *gradient_QH.split(ctx.sizes)


def attach(value: Tensor, gradient_QH: Tensor, states: list[Tensor]) -> Tensor:
    """`value` as a loss whose gradient in the states is known.

    The head's gradient exists already, so `backward()` is called on it as it is.

    Raises:
        RuntimeError: in the backward pass, when it was scaled; on a GPU the gradient becomes NaN,
            and the training loop refuses its norm.
    """
    out: Tensor = _Attach.apply(value, gradient_QH, *states)
    return out
