"""The draft's head and its loss in one pass: logits exist for some rows at a time, never twice.

Positions of the target come in blocks; all rows of all steps that a block's positions teach are
taken together, so the target's distribution is made once per position. Losses, metrics and
gradients of a row come from one visit to its logits; the head's and the norm's gradients go into
`.grad`, those of the states are kept for the backward pass.

Shape suffixes: Q supervised rows of all steps, N rows of a chunk, T tokens, P positions, R rows of
step 0, K steps, H hidden, D draft vocabulary, V target vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from specforge_exp.drafts.layers import RMSNorm, gradient_of
from specforge_exp.drafts.rows import Chains
from specforge_exp.drafts.teacher import Teacher, make_teacher
from specforge_exp.losses import RowLoss, TeacherRows, acceptance_rate, opd_closed

POSITIONS = 512
"""Positions of the target whose distribution is held together."""
LOGITS = 2**25
"""Logits of the draft held together."""
BLOCK = {"cpu": 2**19, "cuda": 2**28}
"""Logits that one round of element-wise operations visits; on a CPU they should fit its cache."""
TILE = {"cpu": 2**20, "cuda": 2**62}
"""Weights of the head that one product takes: with few rows a CPU is faster when it keeps them."""


@dataclass(frozen=True)
class Weighting:
    """What a row's loss is: terms of `losses.opd_closed`, or a function of its own."""

    terms: dict[str, Tensor]
    """Weight of each term at every step [K], divisors and decay included."""
    scale_K: Tensor
    """Weight of `function`'s value at every step."""
    function: Callable[[Tensor, TeacherRows], RowLoss] | None = None
    """A loss that is not made of the known terms; autograd differentiates it."""
    temperature: float = 1.0
    local: bool = False
    """Compare with p renormalised on the draft's vocabulary in every term."""
    floor: float = 0.0
    """See `opd_closed`."""
    drop_unknown: bool = False
    """Leave out rows whose target's best token the draft cannot say."""


@dataclass(frozen=True)
class Heads:
    """Both models' heads and what the target's reads."""

    norm: RMSNorm
    weight_DH: Tensor
    draft_ids_D: Tensor
    target_VH: Tensor
    last_TH: Tensor
    """The target's post-norm last hidden states."""
    next_T: Tensor
    """The token after each position, in the draft's vocabulary (any where it has none)."""


@dataclass
class Tally:
    """What the pass over all rows gives."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Per value the sum over rows of every step, [K]."""
    alpha_KR: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Acceptance rate of each counted row at temperature 1, 0 elsewhere."""
    counted_KR: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Which rows counted, bool."""
    positions: int = 0
    """Positions of the target that were looked at."""
    gradient_QH: Tensor | None = None
    """Gradient of the states of all steps, one step after the other."""

    def add(self, name: str, step_N: Tensor, value_N: Tensor) -> None:
        """Add rows to the sums of their steps."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(len(self.alpha_KR), device=value_N.device)
        self.sums[name].index_add_(0, step_N, value_N.float())


@dataclass(frozen=True)
class Rows:
    """Supervised rows of all steps, sorted by the position that teaches them."""

    flat_Q: Tensor
    """Index among the states of all steps, one step after the other."""
    step_Q: Tensor
    row_Q: Tensor
    at_Q: Tensor
    """Which of the needed positions."""
    position_P: Tensor
    """The needed positions, rising."""
    before_P: Tensor
    """How many rows stand before each position's; one entry more than positions."""


def supervised_rows(chains: Chains) -> Rows:
    """List the rows whose loss counts."""
    device = chains.slot_R.device
    rows = [mask.nonzero()[:, 0] for mask in chains.supervised]
    steps = [torch.full_like(row, step) for step, row in enumerate(rows)]
    position_Q = torch.cat([chains.reads(step)[row] for step, row in enumerate(rows)])
    row_Q, step_Q = torch.cat(rows), torch.cat(steps)
    offset_K = torch.tensor([0, *chains.counts[:-1]], device=device).cumsum(0)
    order_Q = torch.argsort(position_Q, stable=True)
    row_Q, step_Q = row_Q[order_Q], step_Q[order_Q]
    position_P, at_Q, count_P = position_Q[order_Q].unique_consecutive(
        return_inverse=True, return_counts=True
    )
    before_P = torch.cat([count_P.new_zeros(1), count_P.cumsum(0)])
    return Rows(row_Q + offset_K[step_Q], step_Q, row_Q, at_Q, position_P, before_P)


@torch.no_grad()
def tally(
    chains: Chains, states: list[Tensor], heads: Heads, weighting: Weighting, gradient: bool
) -> Tally:
    """Visit every supervised row once.

    Args:
        chains: which rows there are.
        states: un-normed states [R_k, H] of every step.
        heads: both heads.
        weighting: the loss.
        gradient: also make gradients; those of the head and its norm are added to `.grad`.
    """
    rows = supervised_rows(chains)
    flat_QH = torch.cat(states)
    result = Tally(positions=len(rows.position_P))
    result.alpha_KR = torch.zeros(len(states), chains.counts[0], device=flat_QH.device)
    result.counted_KR = torch.zeros_like(result.alpha_KR, dtype=torch.bool)
    if gradient:
        result.gradient_QH = torch.zeros_like(flat_QH)
    last_TH = torch.cat([heads.last_TH, torch.zeros_like(heads.last_TH[:1])])
    before_P = [*rows.before_P[::POSITIONS].tolist(), len(rows.flat_Q)]
    size = max(1, LOGITS // len(heads.weight_DH))
    buffer = torch.empty(min(size, len(rows.flat_Q)), len(heads.weight_DH), device=flat_QH.device)
    for index, position_P in enumerate(rows.position_P.split(POSITIONS)):
        teacher = make_teacher(
            heads.target_VH, last_TH[position_P], heads.draft_ids_D, weighting.temperature
        )
        listed_N = torch.arange(before_P[index], before_P[index + 1], device=flat_QH.device)
        at_N = rows.at_Q[listed_N] - index * POSITIONS
        if weighting.drop_unknown:
            kept_N = teacher.known_P[at_N]
            listed_N, at_N = listed_N[kept_N], at_N[kept_N]
        chunks = max(1, -(-len(listed_N) // size))
        for chunk_N, at in zip(listed_N.chunk(chunks), at_N.chunk(chunks), strict=True):
            visit(flat_QH, (rows, chunk_N, at), teacher, heads, weighting, (result, buffer))
    return result


def visit(
    flat_QH: Tensor,
    listed: tuple[Rows, Tensor, Tensor],
    teacher: Teacher,
    heads: Heads,
    weighting: Weighting,
    into: tuple[Tally, Tensor],
) -> None:
    """One chunk: logits, losses, metrics, and the products of the logits' gradients."""
    rows, listed_N, at_N = listed
    result, buffer = into
    if not len(listed_N):
        return
    flat_N, step_N = rows.flat_Q[listed_N], rows.step_Q[listed_N]
    state_NH = flat_QH[flat_N]
    normed_NH = heads.norm(state_NH)
    weight_DH = heads.weight_DH.to(normed_NH.dtype)
    if normed_NH.dtype == buffer.dtype:
        logits_ND = buffer[: len(listed_N)]
        width = max(1, TILE[buffer.device.type] // weight_DH.shape[1])
        tiles = zip(weight_DH.split(width), logits_ND.split(width, 1), strict=True)
        for weight_LH, logits_NL in tiles:
            torch.mm(normed_NH, weight_LH.T, out=logits_NL)
    else:
        logits_ND = (normed_NH @ weight_DH.T).float()
    gradient = result.gradient_QH is not None
    size = max(1, BLOCK[logits_ND.device.type] // logits_ND.shape[1])
    for block in range(0, len(listed_N), size):
        part = slice(block, block + size)
        next_N = heads.next_T[rows.position_P[rows.at_Q[listed_N[part]]]]
        values = visit_block(
            logits_ND[part], teacher, at_N[part], weighting, (step_N[part], next_N, gradient)
        )
        result.alpha_KR[step_N[part], rows.row_Q[listed_N[part]]] = values["alpha"]
        for name, value_N in values.items():
            result.add(name, step_N[part], value_N)
    result.counted_KR[step_N, rows.row_Q[listed_N]] = True
    if result.gradient_QH is not None:
        narrow_ND = logits_ND.to(normed_NH.dtype)
        if heads.weight_DH.requires_grad:
            total_DH = gradient_of(heads.weight_DH)
            if total_DH.dtype == narrow_ND.dtype:
                total_DH.addmm_(narrow_ND.T, normed_NH)
            else:
                total_DH.add_(narrow_ND.T @ normed_NH)
        result.gradient_QH[flat_N] = heads.norm.backward(state_NH, narrow_ND @ weight_DH)


def visit_block(
    logits_ND: Tensor,
    teacher: Teacher,
    at_N: Tensor,
    weighting: Weighting,
    how: tuple[Tensor, Tensor, bool],
) -> dict[str, Tensor]:
    """Values per row; the logits become their gradient."""
    step_N, next_N, gradient = how
    best_N = teacher.best_P[at_N]
    top_N = logits_ND.gather(1, best_N[:, None])[:, 0] >= logits_ND.amax(-1)
    measured = {"top1": (top_N & teacher.known_P[at_N]).float()}
    scaled = weighting.temperature != 1.0
    if scaled or weighting.local or weighting.function is not None:
        logq_ND = torch.log_softmax(logits_ND, -1)
        measured["alpha"] = acceptance_rate(logq_ND, teacher.plain_rows(at_N))
    target = replace(teacher.rows(at_N), next_N=next_N)
    if weighting.local:
        target = replace(target, log_mass_N=torch.zeros_like(target.log_mass_N))
    if weighting.function is not None:
        return differentiate(weighting, logits_ND, target, step_N, gradient) | measured
    if scaled:
        logits_ND.div_(weighting.temperature)
    weights = {name: weight_K[step_N] for name, weight_K in weighting.terms.items()}
    values = opd_closed(logits_ND, target, weights, weighting.floor, gradient)
    if scaled and gradient:
        logits_ND.div_(weighting.temperature)
    return values | measured


def differentiate(
    weighting: Weighting,
    logits_ND: Tensor,
    target: TeacherRows,
    step_N: Tensor,
    gradient: bool,
) -> dict[str, Tensor]:
    """A loss of the user's own, by autograd on these rows."""
    assert weighting.function is not None
    with torch.set_grad_enabled(gradient):
        leaf_ND = logits_ND.detach().clone().requires_grad_(gradient)
        rows = weighting.function(leaf_ND, target)
        if gradient:
            (rows.loss_N * weighting.scale_K[step_N]).sum().backward()
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
        return None, None, *gradient_QH.split(ctx.sizes)


def attach(value: Tensor, gradient_QH: Tensor, states: list[Tensor]) -> Tensor:
    """`value` as a loss whose gradient in the states is known.

    The head's gradient exists already, so `backward()` is called on it as it is, not scaled.
    """
    out: Tensor = _Attach.apply(value, gradient_QH, *states)
    return out
