"""Layers whose gradients are our own, by autograd's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_exp.drafts import layers
from specforge_exp.drafts.layers import (
    RMSNorm,
    linear,
    narrowed_once,
    norm_linear,
    normed,
    swiglu_down,
)

R, H = 5, 6


def parameter(*shape: int) -> nn.Parameter:
    """A random weight to whose gradient others have been added."""
    weight = nn.Parameter(torch.randn(shape))
    weight.grad = torch.ones(shape)
    return weight


@pytest.mark.parametrize("in_order", [True, False])
def test_gradients_are_autograds(monkeypatch: pytest.MonkeyPatch, in_order: bool) -> None:
    """Of the input and all weights, with an epsilon that counts."""
    monkeypatch.setitem(layers.IN_ORDER, "cpu", in_order)
    torch.manual_seed(0)
    norm = RMSNorm(H, 0.3)
    norm.weight = parameter(H)
    query, gate, up = (parameter(4, H + 3) for _ in range(3))
    down, out = parameter(H, 4), parameter(3, H)
    weights, x_RH = [norm.weight, query, gate, up, down, out], torch.randn(R, H, requires_grad=True)

    def ours() -> Tensor:
        both = norm_linear(x_RH, norm, slice(3, None), query, gate, up, which=slice(1, 3))
        return linear(x_RH + normed(swiglu_down(both, down), norm), out)

    def plain() -> Tensor:
        def unit(x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.3) * norm.weight

        gated, raised = (F.linear(unit(x_RH), weight[:, 3:]) for weight in (gate, up))
        return F.linear(x_RH + unit(F.linear(F.silu(gated) * raised, down)), out)

    found, expected, outer = ours(), plain(), torch.randn(R, 3)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, [x_RH, *weights], outer, allow_unused=True)
    found.backward(outer)
    torch.testing.assert_close(x_RH.grad, wanted[0], rtol=1e-4, atol=1e-5)
    for weight, gradient in zip(weights, wanted[1:], strict=True):
        added = torch.zeros_like(weight) if gradient is None else gradient
        torch.testing.assert_close(weight.grad, 1 + added, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_narrow_copy_is_of_its_columns_and_weights() -> None:
    norm, x_RH = RMSNorm(H, 1e-6), torch.randn(R, H).bfloat16()
    one, two, three = (parameter(4, H + 3) for _ in range(3))
    uses = [(slice(0, H), one, two), (slice(3, None), one, two), (slice(0, H), one, three)]
    with narrowed_once():
        together = [norm_linear(x_RH, norm, *use) for use in uses]
    for found, use in zip(together, uses, strict=True):
        assert found.equal(norm_linear(x_RH, norm, *use))
    one.add_(1)  # as a step of the optimiser, after which no copy is left
    assert not together[0].equal(norm_linear(x_RH, norm, *uses[0]))
