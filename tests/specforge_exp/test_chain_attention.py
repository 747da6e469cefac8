"""A training step by few kernels, as on a GPU, and in the order of the formulas, as on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import test_dflash
import test_eagle3
import test_eagle31
import test_peagle
import torch
from test_eagle3 import LOSS, assert_same, conversation, gradients, packed
from torch import Tensor

from specforge_exp.drafts.draft import Draft
from specforge_exp.target import Target


def made(name: str, target: Target) -> tuple[Draft[Any], Any]:
    """A small draft and its options."""
    if name == "eagle3":
        return test_eagle3.small_draft(target), test_eagle3.CFG
    if name == "eagle3.1":
        return test_eagle31.variant(target, test_eagle31.ALL)
    if name == "peagle":
        return test_peagle.small_draft(target, test_peagle.WINDOW), test_peagle.WINDOW
    return test_dflash.small_draft(target), test_dflash.CFG


def numbers(
    draft: Draft[Any], cfg: Any, target: Target
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss of packed conversations, its gradients, and what the metrics are made of."""
    sample = packed(target, conversation(1), conversation(2, [0, 1, 1, 1, 0]), conversation(3))
    window = draft.denominators(cfg, sample)
    found = draft(sample, target.head, LOSS, cfg, window)[1]
    found.loss.backward()
    return found.loss.detach(), gradients(draft), found.sums  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "eagle3",
        "dflash",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("eagle3.1", "peagle")),
    ],
)
def test_few_kernels_give_the_same_numbers(
    random_target: Target, by_kernels: Callable[[bool], None], name: str, checkpointing: bool
) -> None:
    """The loss, every gradient and every metric."""
    draft, cfg = made(name, random_target)
    draft.gradient_checkpointing = checkpointing
    by_kernels(False)
    expected = numbers(draft, cfg, random_target)
    by_kernels(True)
    loss, found, sums = numbers(draft, cfg, random_target)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert_same(found, expected[1], rel=5e-6)
    torch.testing.assert_close(sums, expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_few_kernels_in_bfloat16(random_target: Target, by_kernels: Callable[[bool], None]) -> None:
    """As a GPU computes: as near to fp32 as the other way, in the same direction."""
    draft, cfg = made("eagle3", random_target)
    by_kernels(False)
    loss, expected, _ = numbers(draft, cfg, random_target)
    draft.compute_dtype = torch.bfloat16
    errors = []
    for few in (False, True):
        by_kernels(few)
        rounded, found, _ = numbers(draft, cfg, random_target)
        torch.testing.assert_close(rounded, loss, rtol=2e-2, atol=0)
        pairs = [(found[name].flatten(), x.flatten()) for name, x in expected.items()]
        errors.append([1 - float(torch.cosine_similarity(one, x, 0)) for one, x in pairs])
    assert max(errors[1]) < max(0.01, 2 * max(errors[0]))
