"""Conversations that the target reads together, each as if it were alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import ENTANGLED, FAMILIES, NOT_FED, build, tokens
from test_train import losses
from torch import Tensor

from specforge_exp.config import Config, TargetConfig, TrainerConfig
from specforge_exp.errors import InputError
from specforge_exp.stages.train import train
from specforge_exp.target import Target
from specforge_exp.target.packing import together

LENGTHS = [3, 21, 9, 14, 1]


def texts() -> list[Tensor]:
    return [tokens(length, seed) for seed, length in enumerate(LENGTHS)]


def difference(target: Target, most: int) -> float:
    """Of states had together from those had one by one, the largest of a conversation's."""
    pairs = zip(target.states(texts(), most), target.states(texts()), strict=True)
    largest = 0.0
    for packed, alone in pairs:
        for mine, theirs in zip(packed, alone, strict=True):
            assert mine.shape == theirs.shape
            largest = max(largest, float((mine - theirs).norm() / theirs.norm()))
    return largest


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_FED])
def test_together_is_one_by_one_or_refused(family: str) -> None:
    """To 1e-5; what is refused is refused in bfloat16 too, where nothing is so near."""
    model = build(FAMILIES[family]()).eval().requires_grad_(False)
    for dtype in (torch.float32, torch.bfloat16):
        target = Target(model.to(dtype), [0, 1])
        if family in ENTANGLED:
            with pytest.raises(InputError, match=r"packed conversations apart .*target.pack_tok"):
                target.take_packing()
            continue
        target.take_packing()
        near = dtype == torch.bfloat16 or difference(target, 30) <= 1e-5
        assert near, difference(target, 30)


def test_forwards_have_room_and_miss_nothing() -> None:
    forwards = together(dict(enumerate(LENGTHS)), 20)
    assert sorted(n for one in forwards for n in one) == [*range(len(LENGTHS))]
    assert [[LENGTHS[n] for n in one] for one in forwards] == [[21], [14, 3, 1], [9]]


@pytest.fixture
def run(cfg: Config, tokens: Path) -> Config:
    return replace(cfg, trainer=TrainerConfig(batch_size=3, log_every=1, eval_every=4), epochs=2)


def test_a_training_that_packs(run: Config) -> None:
    """The losses are those of one by one but for their last digits; the cache on disk is of the
    packed ones, and neither is taken for the other."""
    train(run)
    packed = replace(run, run_name="packed", target=TargetConfig(pack_tokens=64))
    train(packed)
    pairs = zip(losses(packed), losses(run), strict=True)
    assert all(mine == pytest.approx(theirs, rel=1e-4) for mine, theirs in pairs)
    with pytest.raises(InputError, match=r"target.pack_tokens"):
        train(replace(packed, target=TargetConfig()))
    for name, pack_tokens in (("disk", 64), ("other", None)):
        target = TargetConfig(cache="disk", pack_tokens=pack_tokens)
        cached = replace(run, run_name=name, target=target)
        if name == "other":
            with pytest.raises(InputError, match="hidden states of something else"):
                train(cached)
            continue
        train(cached)
        pairs = zip(losses(cached), losses(run), strict=True)
        assert all(mine == pytest.approx(theirs, rel=1e-4) for mine, theirs in pairs)


@pytest.mark.parametrize(
    "options", [{"cache": "memory"}, {"shard": True}, {"placement": "ray"}], ids=str
)
def test_refusals(options: dict[str, object]) -> None:
    (key,) = options
    with pytest.raises(InputError, match=rf"target.pack_tokens=8 and target.{key}=.* exclude"):
        TargetConfig(pack_tokens=8, **options)  # type: ignore[arg-type]
