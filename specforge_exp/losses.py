"""The OPD losses, one value per supervised row, in fp32 log space.

A row is one (slot, step) pair: the draft's logits z over its vocabulary and the target's
distribution p over the full one. C is the mass of p on the draft's vocabulary, p~ = p / C there,
q = softmax(z), r = log q - log p.

    term        value                               gradient in z
    CE          -sum p~ log q                       q - p~
    reverse KL  sum q (log q - log p~)              q (r - sum q r)
    hinge H     sum q max(0, r)                     q (r+ + 1[r>0] - H - M), M = sum of q, r > 0
    TV          1 - sum min(p, q)                   q (1[r>0] - M)
    LK-alpha    -log sum min(p, q)                  (gradient of TV) / sum min(p, q)
    LK-lambda   w KL + (1 - w) TV, w = exp(-alpha) held constant

The hinge is the expected -log acceptance of a token sampled from the draft; TV is the expected
rejection rate; LK-alpha and LK-lambda are the losses of "LK losses" (acceptance-rate training).

Shape suffixes: N rows, D draft vocabulary, V target vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.config import LossConfig


@dataclass(frozen=True)
class TeacherRows:
    """The target's distribution at some rows, as seen from the draft's vocabulary."""

    logp_ND: Tensor
    """log p~, renormalised on the draft's vocabulary; fp32."""
    log_mass_N: Tensor
    """log C; fp32, at most 0."""

    def logp_full_ND(self) -> Tensor:
        """log p on the draft's vocabulary, not renormalised."""
        return self.logp_ND + self.log_mass_N[:, None]


@dataclass(frozen=True)
class RowLoss:
    """A loss per row and its weighted parts, by name (detached values are for reporting)."""

    loss_N: Tensor
    parts: dict[str, Tensor]


LossFunction = Callable[[Tensor, TeacherRows, LossConfig], RowLoss]
"""What a loss's `_target_` names."""


def teacher_rows(logits_ND: Tensor, log_z_N: Tensor, temperature: float = 1.0) -> TeacherRows:
    """Teacher rows from the target's logits.

    Args:
        logits_ND: the target's logits at the draft's tokens, not divided by the temperature.
        log_z_N: logsumexp of the target's logits / temperature over its full vocabulary.
        temperature: of the comparison.
    """
    scaled_ND = logits_ND.float() / temperature
    log_z_draft_N = torch.logsumexp(scaled_ND, -1)
    return TeacherRows(scaled_ND - log_z_draft_N[:, None], log_z_draft_N - log_z_N)


def cross_entropy(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """-sum p~ log q per row: the forward KL up to the entropy of p~."""
    return -(teacher.logp_ND.exp() * logq_ND).sum(-1)


def forward_kl(logq_ND: Tensor, teacher: TeacherRows) -> Tensor:
    """sum p~ (log p~ - log q) per row."""
    return (teacher.logp_ND.exp() * (teacher.logp_ND - logq_ND)).sum(-1)


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
