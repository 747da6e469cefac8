"""Conversations that the target reads together, each as if it were alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENTANGLED, FAMILIES, NOT_FED, VOCABULARY, build, each_family, tokens
from test_train import losses
from torch import Tensor
from transformers import GPT2Config

from specforge_exp.config import Config, TargetConfig, TrainerConfig
from specforge_exp.errors import InputError
from specforge_exp.stages.train import train
from specforge_exp.target import Target, check_decoding
from specforge_exp.target.packing import first_that_follows, last_states, together

LENGTHS = [3, 21, 9, 14, 1]


def texts() -> list[Tensor]:
    """As long as LENGTHS says, and one that is longer than the families' windows."""
    return [tokens(length, seed) for seed, length in enumerate([*LENGTHS, 45])]


def difference(target: Target, most: int) -> float:
    """Of states had together from those had one by one before, the largest of a conversation's."""
    one_by_one = target.states(texts())
    target.take_packing()
    largest = 0.0
    for packed, alone in zip(target.states(texts(), most), one_by_one, strict=True):
        for mine, theirs in zip(packed, alone, strict=True):
            assert mine.shape == theirs.shape
            largest = max(largest, float((mine - theirs).norm() / theirs.norm()))
    return largest


@each_family
def test_together_is_one_by_one_or_refused(family: str) -> None:
    """To 1e-5; what is refused is refused in bfloat16 too, where nothing is so near."""
    if family in NOT_FED:
        return
    model = build(FAMILIES[family]()).eval().requires_grad_(False)
    for dtype in (torch.float32, torch.bfloat16):
        target = Target(model.to(dtype), [0, 1])
        if family in ENTANGLED:
            with pytest.raises(InputError, match=r"packed conversations apart .*target.pack_tok"):
                target.take_packing()
            continue
        apart = difference(target, 75)
        assert apart <= (1e-5 if dtype == torch.float32 else 0.2)
        check_decoding(target)  # what has keys and values kept is no packed text


def test_learnt_positions_begin_anew() -> None:
    sizes = {"n_embd": 64, "n_layer": 8, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    model = build(GPT2Config(vocab_size=VOCABULARY, **sizes)).eval().requires_grad_(False)
    assert difference(Target(model, [0, 1]), 75) <= 1e-5


def scaled_from(floor: int) -> Any:
    """A Llama 4 that scales queries from so many tokens of a forward on."""
    config = FAMILIES["Llama 4 (text)"]()
    config.floor_scale = floor
    return build(config).eval().requires_grad_(False)


def test_no_forward_reaches_the_place_from_which_a_model_scales() -> None:
    """By where a token stands, not by its position: 20 tokens are together but never 30."""
    target = Target(scaled_from(20), [0, 5])
    assert difference(target, 30) <= 1e-5
    ids_T = tokens(20)
    last_states(target.decoder, ids_T, [20], True)
    last_states(target.decoder, ids_T[1:], [10, 9], True)
    with pytest.raises(InputError, match=r"^20 packed tokens, .* 20 on: trainer.pack_tokens=19"):
        last_states(target.decoder, ids_T, [10, 10], True)


def test_an_attention_that_is_not_here_is_passed_over(random_target: Target) -> None:
    model, decoder = random_target.model, random_target.decoder
    assert first_that_follows(model, decoder, ["flash_attention_2", "documents"]) == "documents"
    assert first_that_follows(model, decoder, ["flash_attention_2"]) is None


def test_forwards_have_room_and_miss_nothing() -> None:
    forwards = together(dict(enumerate(LENGTHS)), 20)
    assert sorted(n for one in forwards for n in one) == [*range(len(LENGTHS))]
    assert [[LENGTHS[n] for n in one] for one in forwards] == [[21], [14, 3, 1], [9]]
    assert together({0: 10, 1: 10}, 20) == [[0, 1]]


@pytest.fixture
def run(cfg: Config, tokens: Path) -> Config:
    return replace(cfg, trainer=TrainerConfig(batch_size=3, log_every=1, eval_every=4), epochs=2)


@pytest.mark.slow
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
