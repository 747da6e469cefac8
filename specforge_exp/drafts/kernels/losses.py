"""`losses.opd_closed` by one Triton kernel: three reads of a row's logits instead of some twenty.

Shape suffixes: N rows, P positions, D draft vocabulary, W weights of terms, S sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specforge_exp.drafts.kernels.operators import launch, operator, packed

BLOCK = 2048
"""Logits of a row that a program looks at together."""
TERMS = ("ce", "hard_ce", "kl", "reverse_kl", "hinge", "tv", "lk_alpha", "lk_lambda")
"""In the order in which the kernel has their weights."""
SUMS = ("alpha", "p_logq", "p_r", "q_r", "q_excess", "lk_alpha", "lse")
"""What it gives for each row; names of terms as in `opd_closed`."""


class Known(NamedTuple):
    """The target at some rows, of which several may read one position."""

    logits_PD: Tensor
    """At the draft's tokens, fp32."""
    at_N: Tensor
    """The position of each row."""
    log_z_N: Tensor
    """logsumexp of the logits over the temperature."""
    log_mass_N: Tensor
    """log of the target's mass on the draft's vocabulary."""
    temperature: float
    next_N: Tensor
    """See `TeacherRows`."""


@triton.jit
def ratio(logits, known, at, inside, lse, log_z, heat):
    """log q, log p~ and log q / p~ of some tokens of a row; 0, -inf and 0 outside."""
    logq = tl.load(logits + at, mask=inside, other=0.0) - lse
    logp = tl.load(known + at, mask=inside, other=0.0) / heat - log_z
    return (
        tl.where(inside, logq, float("-inf")),
        tl.where(inside, logp, float("-inf")),
        tl.where(inside, logq - logp, 0.0),
    )


@triton.jit
def write_gradient(logits, known, weights, N, D, heat, floor, scalars, BLOCK: tl.constexpr):
    """In the place of a row's logits; as `losses.into_gradient`."""
    mass, z, lse, rate, reverse, hinge, lk, below, kept = scalars
    lean, lane = tl.exp(-rate), tl.arange(0, BLOCK)
    b, c, w_lambda = tl.load(weights + 3 * N), tl.load(weights + 4 * N), tl.load(weights + 7 * N)
    w_alpha = tl.where((rate > floor) | (floor == 0), tl.load(weights + 6 * N), 0.0)
    d = c + tl.load(weights + 5 * N) + w_lambda * (1 - lean)
    e = tl.load(weights) + tl.load(weights + 2 * N) + w_lambda * lean
    a = e + tl.load(weights + N) + d * below + tl.where(w_alpha == 0, 0.0, w_alpha * kept)
    # Where the target rules a token out, the sums of terms that are not asked for may be infinite.
    a -= tl.where(b == 0, 0.0, b * reverse) + tl.where(c == 0, 0.0, c * hinge)
    for low in range(0, D, BLOCK):
        inside = low + lane < D
        logq, logp, r = ratio(logits, known, low + lane, inside, lse, z, heat)
        slope = a + tl.where(b == 0, 0.0, b * r) - tl.where(r <= mass, d, 0.0)
        slope += tl.where(c == 0, 0.0, c * tl.maximum(r - mass, 0.0))
        # q / alpha by itself: 1 / alpha may be above all numbers.
        share = tl.where(r <= mass, tl.exp(logq + lk), 0.0)
        gradient = tl.exp(logq) * slope - e * tl.exp(logp)
        gradient -= tl.where(w_alpha == 0, 0.0, w_alpha * share)
        tl.store(logits + low + lane, gradient, mask=inside)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["at"])
def loss_kernel(
    logits, known, at, log_z, log_mass, weights, sums, N, D, heat, floor,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: the logsumexp, then its sums, then in the place of the logits their gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * D
    known += tl.load(at + row) * D
    z, mass = tl.load(log_z + row), tl.load(log_mass + row)
    lane = tl.arange(0, BLOCK)
    top, total = float("-inf"), 0.0
    for low in range(0, D, BLOCK):
        block = tl.load(logits + low + lane, mask=low + lane < D, other=float("-inf"))
        higher = tl.maximum(top, tl.max(block, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(block - higher), 0)
        top = higher
    lse = top + tl.log(total)
    alpha = tl.zeros([BLOCK], tl.float32)
    p_logq, p_r, q_r = alpha, alpha, alpha
    q_excess, q_below = alpha, alpha
    top, total, kept = float("-inf"), 0.0, 0.0
    for low in range(0, D, BLOCK):
        inside = low + lane < D
        logq, logp, r = ratio(logits, known, low + lane, inside, lse, z, heat)
        q, p = tl.exp(logq), tl.exp(logp)
        alpha += tl.minimum(q, p * tl.exp(mass))
        p_logq += tl.where(p > 0, p * logq, 0.0)
        p_r += tl.where(p > 0, p * r, 0.0)
        q_r += tl.where(q > 0, q * r, 0.0)
        q_excess += tl.where(q > 0, q * tl.maximum(r - mass, 0.0), 0.0)
        q_below += tl.where(r <= mass, q, 0.0)
        least = tl.where(inside, tl.minimum(r, mass) + logp, float("-inf"))
        higher = tl.maximum(top, tl.max(least, 0))
        part = tl.exp(least - higher)
        total = total * tl.exp(top - higher) + tl.sum(part, 0)
        kept = kept * tl.exp(top - higher) + tl.sum(tl.where(r <= mass, part, 0.0), 0)
        top = higher
    rate, cross, kl = tl.sum(alpha, 0), tl.sum(p_logq, 0), tl.sum(p_r, 0)
    reverse, hinge = tl.sum(q_r, 0), tl.sum(q_excess, 0)
    lk = -(top + tl.log(total))
    tl.store(sums + row, rate)
    tl.store(sums + N + row, cross)
    tl.store(sums + 2 * N + row, kl)
    tl.store(sums + 3 * N + row, reverse)
    tl.store(sums + 4 * N + row, hinge)
    tl.store(sums + 5 * N + row, lk)
    tl.store(sums + 6 * N + row, lse)
    if GRADIENT:
        scalars = mass, z, lse, rate, reverse, hinge, lk, tl.sum(q_below, 0), kept / total
        write_gradient(logits, known, weights + row, N, D, heat, floor, scalars, BLOCK)


@operator("logits_ND")
def loss_rows(
    logits_ND: Tensor, known_PD: Tensor, rows: list[Tensor], weights_WN: Tensor,
    settings: list[float], gradient: bool,
) -> Tensor:  # fmt: skip
    """SUMS of each row, [S, N] fp32; the logits become the gradient of their weighted terms.

    Args:
        logits_ND: fp32, divided by the temperature.
        known_PD: see `Known.logits_PD`.
        rows: `Known`'s at_N, log_z_N and log_mass_N.
        weights_WN: of TERMS.
        settings: the temperature of the target, and the floor of lk_alpha.
        gradient: False leaves the logits as they are.
    """
    packed(logits_ND, known_PD, *rows, weights_WN)
    N, D = logits_ND.shape
    sums_SN = torch.empty(len(SUMS), N, dtype=torch.float32, device=logits_ND.device)
    arrays = logits_ND, known_PD, *rows, weights_WN, sums_SN
    launch(loss_kernel, (N,), *arrays, N, D, *settings, GRADIENT=gradient, BLOCK=BLOCK)
    return sums_SN


def opd_rows(
    logits_ND: Tensor,
    known: Known,
    weights: dict[str, Tensor],
    floor: float = 0.0,
    gradient: bool = True,
) -> dict[str, Tensor]:
    """As `losses.opd_closed`, of a target whose rows need not exist apart.

    Raises:
        ValueError: a term is none of TERMS.
    """
    if unknown := set(weights) - set(TERMS):
        raise ValueError(f"the kernel of the loss has no {', '.join(sorted(unknown))}")
    zero_N = torch.zeros_like(known.log_z_N)
    weights_WN = torch.stack([weights.get(name, zero_N) for name in TERMS])
    hard, next_N1 = "hard_ce" in weights, known.next_N[:, None]
    picked_N = logits_ND.gather(1, next_N1)[:, 0] if hard else zero_N
    rows = [known.at_N, known.log_z_N, known.log_mass_N]
    settings = [known.temperature, floor]
    sums_SN = loss_rows(logits_ND, known.logits_PD, rows, weights_WN, settings, gradient)
    sums = dict(zip(SUMS, sums_SN, strict=True))
    alpha_N, lk_N = sums["alpha"], sums["lk_alpha"]
    if hard and gradient:
        logits_ND.scatter_add_(1, next_N1, -weights["hard_ce"][:, None])
    lean_N = (-alpha_N).exp()
    values = {
        "alpha": alpha_N,
        "ce": -sums["p_logq"],
        "hard_ce": sums["lse"] - picked_N,
        "kl": -sums["p_r"],
        "reverse_kl": sums["q_r"],
        "hinge": sums["q_excess"],
        "tv": 1 - alpha_N,
        "lk_alpha": -alpha_N.clamp(min=floor).log() if floor else lk_N,
        "lk_lambda": -lean_N * sums["p_r"] + (1 - lean_N) * (1 - alpha_N),
    }
    return {name: values[name] for name in ("alpha", *TERMS) if name in ("alpha", *weights)}
