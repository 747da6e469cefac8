"""The OPD losses against their closed forms and the laws that hold between them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import teacher_rows
from torch import Tensor

from specforge_exp import losses
from specforge_exp.config import LossConfig
from specforge_exp.errors import InputError
from specforge_exp.losses import RowLoss, TeacherRows, check_function, cross_entropy, opd

N, V, D = 5, 23, 11


def rows(seed: int, scale: float = 2.0, temperature: float = 1.0) -> tuple[Tensor, TeacherRows]:
    """Draft logits and a teacher over a random draft vocabulary, in float64 precision's fp32."""
    torch.manual_seed(seed)
    target_NV = scale * torch.randn(N, V)
    logits_ND = (scale * torch.randn(N, D)).requires_grad_()
    log_z_N = torch.logsumexp(target_NV / temperature, -1)
    teacher = teacher_rows(target_NV[:, :D], log_z_N, temperature)
    return logits_ND, replace(teacher, next_N=torch.randint(0, D, (N,)))


def next_of(teacher: TeacherRows) -> Tensor:
    assert teacher.next_N is not None
    return teacher.next_N


def closed_form(name: str, logq: Tensor, teacher: TeacherRows) -> Tensor:
    """The gradients in z that the module's docstring states."""
    q, r = logq.exp(), logq - teacher.logp_full_ND()
    rt = logq - teacher.logp_ND
    above = (r > 0).float()
    mass = (q * above).sum(-1, keepdim=True)
    alpha = losses.acceptance_rate(logq, teacher)[:, None]
    h = losses.hinge(logq, teacher)[:, None]
    ce, tv = q - teacher.logp_ND.exp(), q * (above - mass)
    w = (-alpha).exp()
    return {
        "lambda_ce": ce,
        "lambda_hard": q - torch.nn.functional.one_hot(next_of(teacher), D),
        "lambda_rkl": q * (rt - (q * rt).sum(-1, keepdim=True)),
        "beta": q * (r.relu() + above - h - mass),
        "lambda_tv": tv,
        "lambda_lk_alpha": tv / alpha,
        "lambda_lk": w * ce + (1 - w) * tv,
    }[name]


@pytest.mark.parametrize("name", list(losses.TERMS))
@pytest.mark.parametrize("seed", range(5))
def test_gradient_is_the_closed_form(name: str, seed: int) -> None:
    logits_ND, teacher = rows(seed)
    opd(logits_ND, teacher, LossConfig(name="one", **{name: 1.0})).loss_N.sum().backward()
    expected = closed_form(name, torch.log_softmax(logits_ND.detach(), -1), teacher)
    torch.testing.assert_close(logits_ND.grad, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 6.0))
def test_inequalities(seed: int, scale: float) -> None:
    """TV <= -log alpha <= H, and RKL <= H <= RKL - log C + TV."""
    logits_ND, teacher = rows(seed, scale)
    logq = torch.log_softmax(logits_ND.detach(), -1)
    tv, lk, h = (f(logq, teacher) for f in (losses.total_variation, losses.lk_alpha, losses.hinge))
    rkl = losses.reverse_kl(logq, teacher)
    slack = 1e-4 * (1 + h)
    assert (tv <= lk + slack).all()
    assert (lk <= h + slack).all()
    assert (rkl - teacher.log_mass_N <= h + slack).all()
    assert (h <= rkl - teacher.log_mass_N + tv + slack).all()
    assert ((tv >= -1e-6) & (tv <= 1 + 1e-6)).all()


@pytest.mark.parametrize("name", [name for name in losses.TERMS if name != "lambda_hard"])
def test_no_gradient_at_the_teacher(name: str) -> None:
    _, teacher = rows(1)
    logits_ND = teacher.logp_ND.clone().requires_grad_()
    opd(logits_ND, teacher, LossConfig(name="one", **{name: 1.0})).loss_N.sum().backward()
    assert logits_ND.grad is not None
    assert logits_ND.grad.abs().max() < 1e-5
    logq = teacher.logp_ND
    torch.testing.assert_close(losses.hinge(logq, teacher), -teacher.log_mass_N)
    torch.testing.assert_close(losses.total_variation(logq, teacher), 1 - teacher.log_mass_N.exp())


def test_identity_vocabulary_has_all_the_mass() -> None:
    logits_NV = torch.randn(N, V)
    teacher = teacher_rows(logits_NV, torch.logsumexp(logits_NV, -1))
    torch.testing.assert_close(teacher.log_mass_N, torch.zeros(N), atol=1e-6, rtol=0)


def test_temperature_divides_both_sides() -> None:
    logits_ND, teacher = rows(2, temperature=2.0)
    cfg = LossConfig(name="t", lambda_ce=1.0, temperature=2.0)
    expected = losses.cross_entropy(torch.log_softmax(logits_ND / 2, -1), teacher)
    torch.testing.assert_close(opd(logits_ND, teacher, cfg).loss_N, expected)


def test_mixture_is_the_weighted_sum() -> None:
    logits_ND, teacher = rows(3)
    mixed = opd(logits_ND, teacher, LossConfig(name="m", lambda_ce=0.4, lambda_rkl=0.5, beta=0.1))
    parts = mixed.parts
    assert set(parts) == {"ce", "reverse_kl", "hinge"}
    total = 0.4 * parts["ce"] + 0.5 * parts["reverse_kl"] + 0.1 * parts["hinge"]
    torch.testing.assert_close(mixed.loss_N.detach(), total)


def test_extreme_logits_stay_finite() -> None:
    logits_ND = torch.tensor([[90.0, -90.0, 0.0]], requires_grad=True)
    target = torch.tensor([[-90.0, 90.0, 0.0, 5.0]])
    teacher = teacher_rows(target[:, :3], torch.logsumexp(target, -1))
    teacher = replace(teacher, next_N=torch.tensor([1]))
    cfg = LossConfig(name="all", **dict.fromkeys(losses.TERMS, 1.0))
    loss = opd(logits_ND, teacher, cfg).loss_N.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits_ND.grad).all()


def test_weights_are_checked() -> None:
    with pytest.raises(InputError, match="at least one loss weight"):
        LossConfig(name="none")
    with pytest.raises(InputError, match=r"loss\.beta=-0\.1 must be at least 0"):
        LossConfig(name="negative", lambda_ce=1.0, beta=-0.1)
    LossConfig(name="of_mine", _target_="mine.loss")  # which has knobs of its own


TERM_WEIGHTS = st.fixed_dictionaries(
    {name: st.sampled_from([0.0, 0.0, 0.3, 1.0]) for name in losses.TERMS}
).filter(lambda weights: any(weights.values()))


@settings(max_examples=60, deadline=None)
@given(TERM_WEIGHTS, st.integers(0, 1000), st.sampled_from([0.5, 2.0, 6.0]))
def test_the_closed_form_is_what_autograd_finds(
    weights: dict[str, float], seed: int, scale: float
) -> None:
    """Values and the gradient of any mixture, with a weight of its own for every row."""
    logits, teacher = rows(seed, scale)
    cfg = LossConfig(name="m", **weights)
    each = torch.linspace(0.1, 2.0, N)
    expected = opd(logits, teacher, cfg)
    (gradient,) = torch.autograd.grad((expected.loss_N * each).sum(), logits)
    found = logits.detach().clone()
    named = {losses.TERMS[key][0]: weight * each for key, weight in weights.items() if weight > 0}
    values = losses.opd_closed(found, teacher, named)
    assert set(values) == set(expected.parts) | {"alpha"}
    for name, value in expected.parts.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-5)
    rounding = 64 * torch.finfo(torch.float32).eps * scale  # of log-ratios, some times the scale
    assert float((found - gradient).abs().max()) <= 2e-5 * float(gradient.abs().max()) + rounding


@pytest.mark.parametrize("name", ["lambda_ce", "lambda_tv", "lambda_lk_alpha", "lambda_lk"])
def test_tokens_that_the_target_rules_out(name: str) -> None:
    """Logits of -inf: what is finite in the formula is a number in both forms."""
    torch.manual_seed(1)
    target_NV = torch.randn(N, V)
    target_NV[:, 3:7] = float("-inf")
    teacher = teacher_rows(target_NV[:, :D], torch.logsumexp(target_NV, -1))
    logits_ND = torch.randn(N, D, requires_grad=True)
    expected = opd(logits_ND, teacher, LossConfig(name="one", **{name: 1.0})).loss_N
    expected.sum().backward()
    found = logits_ND.detach().clone()
    term = losses.TERMS[name][0]
    values = losses.opd_closed(found, teacher, {term: torch.ones(N)})
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(values[term], expected.detach())
    torch.testing.assert_close(found, logits_ND.grad)


@pytest.mark.parametrize("apart", [60.0, 95.0, 130.0])
def test_an_acceptance_rate_below_all_numbers_has_a_gradient(apart: float) -> None:
    """-log alpha is linear there; 1 / alpha overflows, and alpha is 0 in fp32."""
    torch.manual_seed(2)
    target_NV, logits_ND = torch.randn(N, V), torch.randn(N, D)
    target_NV[:, :4] += apart
    logits_ND[:, 4:] += apart
    teacher = teacher_rows(target_NV[:, :D], torch.logsumexp(target_NV, -1))
    wide_ND = logits_ND.double().requires_grad_()
    expected_N = losses.lk_alpha(wide_ND.log_softmax(-1), teacher)
    expected_N.sum().backward()
    values = losses.opd_closed(logits_ND, teacher, {"lk_alpha": torch.ones(N)})
    assert float(values["lk_alpha"].min()) > apart - 10
    torch.testing.assert_close(values["lk_alpha"].double(), expected_N.detach())
    torch.testing.assert_close(logits_ND.double(), wide_ND.grad, rtol=1e-3, atol=1e-5)


def test_without_a_gradient_the_values_are_the_same() -> None:
    logits, teacher = rows(3)
    weights = {"ce": torch.ones(N), "hinge": torch.ones(N)}
    made, only = (
        losses.opd_closed(logits.detach().clone(), teacher, weights, gradient=g)
        for g in (True, False)
    )
    for name, value in made.items():
        assert torch.equal(value, only[name])


def two_arguments(logits_ND: Tensor, teacher: TeacherRows) -> RowLoss:
    return RowLoss(cross_entropy(logits_ND.log_softmax(-1), teacher), {})


def a_mean(logits_ND: Tensor, teacher: TeacherRows, cfg: LossConfig) -> RowLoss:
    return RowLoss(cross_entropy(logits_ND.log_softmax(-1), teacher).mean(), {})


def detached(logits_ND: Tensor, teacher: TeacherRows, cfg: LossConfig) -> RowLoss:
    return RowLoss(cross_entropy(logits_ND.detach().log_softmax(-1), teacher), {})


def no_row_loss(logits_ND: Tensor, teacher: TeacherRows, cfg: LossConfig) -> Any:
    return cross_entropy(logits_ND.log_softmax(-1), teacher)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (two_arguments, "it fails: TypeError: two_arguments"),
        (a_mean, r"for three rows loss_N has the shape \[\]"),
        (detached, "it fails: RuntimeError: element 0 of tensors does not require grad"),
        (no_row_loss, "it fails: AttributeError"),
    ],
)
def test_a_loss_of_ones_own_is_tried_first(function: Any, message: str) -> None:
    mixed = LossConfig(name="mixed", lambda_ce=0.5, lambda_rkl=0.5)
    place = (5, torch.device("cpu"))
    check_function(opd, mixed, *place)
    with pytest.raises(InputError, match=f"^loss._target_=.*{message}"):
        check_function(function, mixed, *place)
