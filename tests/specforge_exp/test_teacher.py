"""The target at some positions, tile by tile, beside its whole logits in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_exp.drafts import teacher
from specforge_exp.drafts.teacher import Teacher, make_teacher
from specforge_exp.target import Head

IDS_D = torch.tensor([1, 2, 5, 6, 7, 13, 22])
AT_N = torch.tensor([4, 0, 0, 3])


def head() -> Head:
    """23 tokens, with all that a head may have."""
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(23, 8, generator=generator)
    bias_V = torch.randn(23, generator=generator)
    return Head(weight_VH, bias_V, 0.5, 6.0)


def states() -> Tensor:
    """Of five positions."""
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)) * 2


def made(monkeypatch: pytest.MonkeyPatch, tile: int, **options: Any) -> tuple[Teacher, Tensor]:
    """The teacher with so many logits at once, and all logits in fp64."""
    monkeypatch.setitem(teacher.TILE_ELEMENTS, "cpu", tile)
    logits_PV = head().tile(states(), slice(None)).double()
    return make_teacher(head(), states(), IDS_D, **options), logits_PV


@pytest.mark.parametrize("tile", [1, 10, 35, 55, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tiles_add_up_to_the_distribution(
    monkeypatch: pytest.MonkeyPatch, tile: int, temperature: float
) -> None:
    """At the loss's temperature, and at 1 for what verification accepts."""
    found, logits_PV = made(monkeypatch, tile, temperature=temperature)
    for rows, scale in ((found.rows(AT_N), temperature), (found.plain_rows(AT_N), 1.0)):
        logp_NV = (logits_PV[AT_N] / scale).log_softmax(-1)
        mass_N = logp_NV[:, IDS_D].logsumexp(-1)
        torch.testing.assert_close(rows.log_mass_N.double(), mass_N, rtol=1e-5, atol=1e-6)
        own_ND = logp_NV[:, IDS_D] - mass_N[:, None]
        torch.testing.assert_close(rows.logp_ND.double(), own_ND, rtol=1e-5, atol=1e-5)
    best_P = logits_PV[:, IDS_D].argmax(-1)
    assert found.best_P.tolist() == best_P.tolist()
    assert found.sayable_P.tolist() == (IDS_D[best_P] == logits_PV.argmax(-1)).tolist()
    assert 0 < int(found.sayable_P.sum()) < len(best_P)
    for local in (False, True):  # what a kernel makes the rows of
        logits_PD, at_N, log_z_N, mass_N, heat = found.shared(AT_N, local)
        rows = found.rows(AT_N)
        assert torch.equal(logits_PD[at_N] / heat - log_z_N[:, None], rows.logp_ND)
        assert torch.equal(mass_N, 0 * mass_N if local else rows.log_mass_N)


def test_a_tie_can_be_said() -> None:
    """With a token that the draft has not, before or after it."""
    for other in (4, 14):
        weight_VH = torch.zeros(23, 8)
        weight_VH[[13, other], 0] = 1.0
        found = make_teacher(Head(weight_VH), torch.eye(8)[:2], IDS_D, host_ids_D=IDS_D)
        assert found.best_P.tolist() == [5, 0] and found.sayable_P.tolist() == [True, True]
    weight_VH[14] *= 2
    assert make_teacher(Head(weight_VH), torch.eye(8)[:1], IDS_D).sayable_P.tolist() == [False]
