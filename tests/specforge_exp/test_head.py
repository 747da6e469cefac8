"""Scale, soft cap and bias of a head, found from what a model serves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_exp.errors import InputError
from specforge_exp.target.head import Head, fit_head


def text(**numbers: Any) -> Any:
    """A configuration with these entries."""
    return SimpleNamespace(model_type="own", to_dict=lambda: numbers)


def parts(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [V, H], bias [V] and states [N, H]."""
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(20, 8, generator=generator)
    bias_V, states_NH = weight_VH[:, 0].clone(), torch.randn(6, 8, generator=generator) * 3
    return weight_VH.to(dtype), bias_V.to(dtype), states_NH.to(dtype)


@pytest.mark.parametrize(
    ("scale", "softcap", "numbers"),
    [
        (1.0, None, {"final_logit_softcapping": None, "attn_logit_softcapping": 5.0}),
        (0.25, None, {"logit_scale": 0.25, "use_logit_bias": True}),
        (1 / 8, None, {"logits_scaling": 8}),
        (0.5, None, {"lm_head_multiplier": 0.5, "router_logit_scale": 2.5}),
        (1.0, 4.0, {"final_logit_softcapping": 4.0}),
        (0.25, 6.0, {"logit_scale": 0.25, "softcap": 6.0}),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_what_was_served_is_found(
    scale: float, softcap: float | None, numbers: dict[str, Any], biased: bool
) -> None:
    """softcap * tanh(scale * (W h + b) / softcap), in columns and as a whole."""
    weight_VH, bias_V, states_NH = parts()
    served_NV = states_NH @ weight_VH.T + (bias_V if biased else 0)
    served_NV = served_NV * scale
    if softcap is not None:
        served_NV = softcap * torch.tanh(served_NV / softcap)
    given = bias_V if biased else None
    head = fit_head(weight_VH, given, states_NH, served_NV, text(**numbers))
    assert (head.scale, head.softcap) == (scale, softcap)
    torch.testing.assert_close(head(states_NH), served_NV)
    tiles = [head.tile(states_NH, slice(first, first + 7)) for first in (0, 7, 14)]
    torch.testing.assert_close(torch.cat(tiles, 1), served_NV)


def test_what_is_near_is_not_the_same() -> None:
    """In fp32 one per cent of the largest logit is another head, also where all are below zero; in
    bfloat16 it is rounding."""
    some_VH, _, states_NH = parts()
    for weight_VH in (some_VH, -some_VH.abs()):
        served_NV = states_NH.abs() @ weight_VH.T
        fit_head(weight_VH, None, states_NH.abs(), served_NV, text())
        served_NV[3, 4] += 0.01 * float(served_NV.abs().max())
        with pytest.raises(InputError, match=r"the logits of own .*differ by 1%"):
            fit_head(weight_VH, None, states_NH.abs(), served_NV, text())
    weight_VH, _, states_NH = parts(torch.bfloat16)
    near_NV = states_NH.float() @ weight_VH.float().T * 1.01
    assert fit_head(weight_VH, None, states_NH, near_NV, text()).scale == 1.0


@pytest.mark.parametrize("tokens", [None, 18, 19, 20, 25])
def test_padding_is_never_said(tokens: int | None) -> None:
    weight_VH, _, states_NH = parts()
    said_NV = Head(weight_VH, tokens=tokens)(states_NH).isfinite()
    assert said_NV.sum(1).tolist() == [min(tokens or 20, 20)] * 6
    assert said_NV[:, : tokens or 20].all()
