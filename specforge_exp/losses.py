"""The OPD losses, one value per supervised row, in fp32 log space.

A row is one (slot, step) pair: the draft's logits z over its vocabulary and the target's
distribution p over the full one. C is the mass of p on the draft's vocabulary, p~ = p / C there,
q = softmax(z), r = log q - log p.

    term        value                               gradient in z
    CE          -sum p~ log q                       q - p~
    hard CE     -log q(next token)                  q - 1[next token]
    reverse KL  sum q (log q - log p~)              q (r - sum q r)
    hinge H     sum q max(0, r)                     q (r+ + 1[r>0] - H - M), M = sum of q, r > 0
    TV          1 - sum min(p, q)                   q (1[r>0] - M)
    LK-alpha    -log sum min(p, q)                  (gradient of TV) / sum min(p, q)
    LK-lambda   w KL + (1 - w) TV, w = exp(-alpha) held constant

The hinge is the expected -log acceptance of a token sampled from the draft; TV is the expected
rejection rate; LK-alpha and LK-lambda are the losses of "LK losses" (acceptance-rate training).

`opd` leaves the gradients to autograd and is the reference; `opd_closed` gives the same values and
puts the gradient of their weighted sum in place of the logits, in a few passes over them.

Shape suffixes: N rows, D draft vocabulary, V target vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.config import LossConfig
from specforge_exp.errors import InputError, first_line


@dataclass(frozen=True)
class TeacherRows:
    """The target's distribution at some rows, as seen from the draft's vocabulary."""

    logp_ND: Tensor
    """log p~, renormalised on the draft's vocabulary; fp32."""
    log_mass_N: Tensor
    """log C; fp32, at most 0."""
    next_N: Tensor | None = None
    """The text's own next token, in the draft's vocabulary; needed by hard CE alone."""

    def logp_full_ND(self) -> Tensor:
        """log p on the draft's vocabulary, not renormalised."""
        return self.logp_ND + self.log_mass_N[:, None]


@dataclass(frozen=True)
class RowLoss:
    """A loss per row and its weighted parts, by name (detached values are for reporting)."""

    loss_N: Tensor
    parts: dict[str, Tensor]


LOWEST = torch.finfo(torch.float32).min
LossFunction = Callable[[Tensor, TeacherRows, LossConfig], RowLoss]
"""What a loss's `_target_` names."""


def check_function(
    function: LossFunction, cfg: LossConfig, size: int, device: torch.device
) -> None:
    """Try a loss of the user's own on three rows.

    Args:
        function: the loss.
        cfg: its weights and options.
        size: tokens that the draft can propose.
        device: where it will be computed.

    Raises:
        InputError: it fails, has no gradient, or gives something else than a value per row.
    """
    logits_ND = torch.linspace(-1.0, 1.0, 3 * size, device=device).view(3, size).requires_grad_()
    logp_ND = logits_ND.detach().flip(1).log_softmax(-1)
    next_N = torch.zeros(3, dtype=torch.long, device=device)
    teacher = TeacherRows(logp_ND, torch.zeros(3, device=device), next_N)
    try:
        rows = function(logits_ND, teacher, cfg)
        rows.loss_N.sum().backward()
        shapes = {"loss_N": rows.loss_N.shape} | {k: v.shape for k, v in rows.parts.items()}
        odd = [f"{name} has the shape {[*size]}" for name, size in shapes.items() if size != (3,)]
        why = f"for three rows {', '.join(odd)}" if odd else ""
    except Exception as error:
        why = f"on three rows it fails: {type(error).__name__}: {first_line(error)}"
    if why:
        raise InputError(
            f"loss._target_={cfg._target_}: {why}; a loss takes (logits_ND, teacher, cfg) and "
            "returns a RowLoss with a value per row, as specforge_exp.losses.opd"
        )


@dataclass(frozen=True)
class Loss:
    """What is to be made small: a function, and the weights and options it is given."""

    function: LossFunction
    cfg: LossConfig
    scale: float = 1.0
    """Multiplies it."""
    proposed: "ProposedLoss | None" = None
    """The loss on what the draft proposed itself."""


@dataclass(frozen=True)
class ProposedLoss:
    """What is to be made small where a draft proposed; None: nothing there."""

    accepted: Loss | None
    """Where the target accepts."""
    rejected: Loss | None
    """Where it rejects."""
    decay: float
    """The k-th proposed token weighs decay**(k - 1)."""
    start: int = 0
    """Steps before the first one in which that counts; until then, and where nothing is trained,
    the loss on the text has its full weight."""


def cross_entropy(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """-sum p~ log q per row: the forward KL up to the entropy of p~."""
    return -(teacher.logp_ND.exp() * logq_ND).sum(-1)


def hard_cross_entropy(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """-log q(next token of the text) per row."""
    assert teacher.next_N is not None, "hard CE needs the text"
    return -logq_ND.gather(1, teacher.next_N[:, None])[:, 0]


def forward_kl(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """sum p~ (log p~ - log q) per row."""
    logp_ND = teacher.logp_ND.clamp(min=LOWEST)  # 0 log 0 is 0
    return (teacher.logp_ND.exp() * (logp_ND - logq_ND)).sum(-1)


def reverse_kl(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """sum q (log q - log p~) per row, by its exact expectation.

    Differentiating log q - log p~ at tokens sampled from q has an expected gradient of zero.
    """
    return (logq_ND.exp() * (logq_ND - teacher.logp_ND)).sum(-1)


def hinge(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """sum q max(0, log q - log p) per row with p not renormalised."""
    return (logq_ND.exp() * (logq_ND - teacher.logp_full_ND()).relu()).sum(-1)


def acceptance_rate(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """alpha = sum min(p, q) per row: the chance that the target accepts a token sampled from q."""
    return torch.minimum(logq_ND, teacher.logp_full_ND()).exp().sum(-1)


def total_variation(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """1 - alpha per row."""
    return 1 - acceptance_rate(logq_ND, teacher)


def lk_alpha(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """-log alpha per row, without leaving log space."""
    return -torch.logsumexp(torch.minimum(logq_ND, teacher.logp_full_ND()), -1)


def lk_lambda(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """w KL + (1 - w) TV per row; w = exp(-alpha) leans on TV as the acceptance rate rises."""
    tv_N = total_variation(logq_ND, teacher)
    weight_N = (tv_N.detach() - 1).exp()
    return weight_N * forward_kl(logq_ND, teacher) + (1 - weight_N) * tv_N


TERMS = {
    "lambda_ce": ("ce", cross_entropy),
    "lambda_hard": ("hard_ce", hard_cross_entropy),
    "lambda_rkl": ("reverse_kl", reverse_kl),
    "beta": ("hinge", hinge),
    "lambda_tv": ("tv", total_variation),
    "lambda_lk_alpha": ("lk_alpha", lk_alpha),
    "lambda_lk": ("lk_lambda", lk_lambda),
}


def opd(logits_ND: Tensor, teacher: TeacherRows, cfg: LossConfig) -> RowLoss:
    """The weighted sum of the terms whose weight is above 0.

    Args:
        logits_ND: the draft's logits.
        teacher: the target at the same rows, at `cfg.temperature`.
        cfg: the weights and the temperature.

    Returns:
        The loss per row and each term's unweighted value per row, detached, by its name.
    """
    logq_ND = torch.log_softmax(logits_ND.float() / cfg.temperature, -1)
    total_N = logq_ND.new_zeros(len(logq_ND))
    parts = {}
    for weight_name, weight in cfg.weights().items():
        if weight > 0:
            name, term = TERMS[weight_name]
            value_N = term(logq_ND, teacher)
            total_N = total_N + weight * value_N
            parts[name] = value_N.detach()
    return RowLoss(total_N, parts)


def opd_closed(
    logits_ND: Tensor, teacher: TeacherRows, weights: dict[str, Tensor], floor: float = 0.0,
    gradient: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """Values of the weighted terms per row; the logits become the gradient of their weighted sum.

    Args:
        logits_ND: fp32, divided by the temperature; overwritten.
        teacher: the target at the same rows.
        weights: weight [N] of each term in the sum, by the term's name (those of TERMS, or kl).
        floor: lk_alpha holds the acceptance rate at this value below it, as the peers do.
        gradient: False leaves the logits undefined.

    Returns:
        The terms named by `weights`, unweighted, and always `alpha`; [N] each.
    """
    logq_ND = logits_ND.sub_(torch.logsumexp(logits_ND, -1, keepdim=True))
    q_ND, target_ND = logq_ND.exp(), teacher.logp_ND.exp()
    alpha_N = torch.minimum(q_ND, target_ND * teacher.log_mass_N.exp()[:, None]).sum(-1)
    values, zero_N = {}, torch.zeros_like(alpha_N)
    if "ce" in weights:
        values["ce"] = -torch.linalg.vecdot(target_ND, logq_ND)
    if "hard_ce" in weights:
        values["hard_ce"] = hard_cross_entropy(logq_ND, teacher)
    if len(weights) == 1 and values:
        if gradient:
            logits_ND.copy_(q_ND - target_ND if "ce" in weights else q_ND)
            logits_ND.mul_(next(iter(weights.values()))[:, None])
            subtract_next(logits_ND, teacher, weights)
        return values | {"alpha": alpha_N}
    r_ND, mass_N1 = logq_ND.sub_(teacher.logp_ND), teacher.log_mass_N[:, None]
    below_ND, excess_ND = (r_ND <= mass_N1).to(q_ND.dtype), (r_ND - mass_N1).relu_()
    e_N = weights.get("ce", zero_N) + weights.get("kl", zero_N)
    tv_N, b_N, c_N = (weights.get(name, zero_N) for name in ("tv", "reverse_kl", "hinge"))
    share_ND = zero_N[:, None]
    of_q = {"reverse_kl": r_ND, "hinge": excess_ND}
    values |= {name: torch.linalg.vecdot(q_ND, x) for name, x in of_q.items() if name in weights}
    values |= {"kl": kl_of(target_ND, r_ND)} if "kl" in weights else {}
    if "lk_alpha" in weights:
        value_N, share_ND = kept(r_ND, teacher, below_ND)
        share_ND.mul_((weights["lk_alpha"] * ((alpha_N > floor) | (floor == 0)))[:, None])
        values["lk_alpha"] = -alpha_N.clamp(min=floor).log() if floor else value_N
    values |= {"tv": 1 - alpha_N} if "tv" in weights else {}
    if "lk_lambda" in weights:
        kl_N, lean_N = kl_of(target_ND, r_ND), (-alpha_N).exp()
        values["lk_lambda"] = lean_N * kl_N + (1 - lean_N) * (1 - alpha_N)
        tv_N = tv_N + weights["lk_lambda"] * (1 - lean_N)
        e_N = e_N + weights["lk_lambda"] * lean_N
    if gradient:
        d_N = c_N + tv_N
        a_N = e_N + weights.get("hard_ce", zero_N) + d_N * torch.linalg.vecdot(q_ND, below_ND)
        a_N = a_N - b_N * values.get("reverse_kl", 0) - c_N * values.get("hinge", 0)
        a_N = a_N + share_ND.sum(-1)
        leave_out(weights, of_q)
        into_gradient(r_ND, q_ND, target_ND, below_ND, excess_ND, (a_N, b_N, c_N, d_N, e_N))
        if "lk_alpha" in weights:
            r_ND.sub_(share_ND)
        subtract_next(r_ND, teacher, weights)
    return values | {"alpha": alpha_N}


def kl_of(target_ND: Tensor, r_ND: Tensor) -> Tensor:
    """sum p~ (log p~ - log q) per row; 0 log 0, where r is infinite, is 0."""
    kl_N: Tensor = -torch.linalg.vecdot(target_ND, r_ND.clamp(max=-LOWEST))
    return kl_N


def kept(r_ND: Tensor, teacher: TeacherRows, below_ND: Tensor) -> tuple[Tensor, Tensor]:
    """-log alpha per row, and q / alpha where r <= 0, else 0.

    It is min(p, q) / alpha there, at most 1; 1 / alpha by itself may be above all numbers.
    """
    share_ND = torch.minimum(r_ND, teacher.log_mass_N[:, None]).add_(teacher.logp_ND)
    value_N = -torch.logsumexp(share_ND, -1)
    return value_N, share_ND.add_(value_N[:, None]).exp_().mul_(below_ND)


def leave_out(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> None:
    """Factors of terms that have no weight become 0: they are infinite where p is 0."""
    for name, factor_ND in factors.items():
        if name not in weights:
            factor_ND.zero_()


def into_gradient(
    r_ND: Tensor,
    q_ND: Tensor,
    target_ND: Tensor,
    below_ND: Tensor,
    excess_ND: Tensor,
    coefficients: tuple[Tensor, ...],
) -> None:
    """r becomes q (a + b r + c r+ - d 1[r<=0]) - e p~.

    With L = sum of q where r <= 0, the gradient of TV is q (L - 1[r<=0]) and every gradient of the
    table has this form: one pass serves any mixture.
    """
    a_N1, b_N1, c_N1, d_N1, e_N1 = (value_N[:, None] for value_N in coefficients)
    r_ND.mul_(b_N1).add_(a_N1).addcmul_(excess_ND, c_N1)
    r_ND.addcmul_(below_ND, d_N1, value=-1).mul_(q_ND).addcmul_(target_ND, e_N1, value=-1)


def subtract_next(gradient_ND: Tensor, teacher: TeacherRows, weights: dict[str, Tensor]) -> None:
    """The one entry per row in which the gradient of hard CE is not q."""
    if "hard_ce" in weights:
        assert teacher.next_N is not None
        gradient_ND.scatter_add_(1, teacher.next_N[:, None], -weights["hard_ce"][:, None])
