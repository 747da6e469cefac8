"""A target with compiled layers: the same states but for their last digits, or a refusal."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, tokens
from test_train import losses

from specforge_exp import paths
from specforge_exp.config import Config, TargetConfig, TrainerConfig
from specforge_exp.errors import InputError
from specforge_exp.stages import train as stage
from specforge_exp.stages.train import train
from specforge_exp.target import Target, load_target
from specforge_exp.training.checkpoint import step_folders
from specforge_exp.training.loop import TrainingRun
from specforge_exp.training.ranks import Ranks


@pytest.mark.slow
def test_any_length_and_what_is_decoded() -> None:
    """Windows that are shorter and longer than a text, one token, and a cache, which is as ever."""
    target = Target(build(FAMILIES["Mistral v0.3"]()).eval().requires_grad_(False), [0, 3, 7])
    texts = [tokens(length, length) for length in (9, 70, 1, 33, 2)]
    own = target.states(texts)
    target.compile_layers()
    for _ in range(2):
        for pair, expected in zip(target.states(texts), own, strict=True):
            for states, others in zip(pair, expected, strict=True):
                assert float((states - others).norm() / others.norm()) < 1e-5
    decoded_1TH = target.features(texts[0][None], target.new_cache())[1]
    plain = Target(target.model, target.aux_layers)
    assert decoded_1TH.equal(plain.features(texts[0][None], plain.new_cache())[1])
    pairs = zip(target.last_layers(2), plain.last_layers(2), strict=True)
    for mine, others in pairs:  # what looks into a layer
        assert mine.keys() == others.keys() and "input_layernorm.weight" in mine
        assert all(weight.equal(others[name]) for name, weight in mine.items())


@pytest.mark.slow
def test_a_training(cfg: Config, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are those of the plain target but for their last digits, the same to the bit when it
    is continued, and neither run nor cache is taken for the other's."""
    run = replace(cfg, trainer=TrainerConfig(batch_size=3, log_every=1, save_every=2), epochs=2)
    train(run)
    target = TargetConfig(compile=True)
    compiled = replace(run, run_name="compiled", target=target)
    train(compiled)
    pairs = zip(losses(compiled), losses(run), strict=True)
    assert all(mine == pytest.approx(theirs, rel=1e-4) for mine, theirs in pairs)
    with pytest.raises(InputError, match=r"target.compile"):
        train(replace(compiled, target=TargetConfig()))
    torch._dynamo.reset()  # as in another process
    (paths.run_dir(compiled) / "run.json").unlink()
    oldest, *newest = step_folders(paths.run_dir(compiled))
    assert newest, oldest
    for newer in newest:
        shutil.rmtree(newer)
    before = losses(compiled)
    train(compiled)
    assert losses(compiled) == before
    cached = replace(run, run_name="disk", target=replace(target, cache="disk"))
    train(cached)
    assert losses(cached) == before
    again = replace(cached, run_name="again")
    with monkeypatch.context() as patch:  # the states are there: nothing is to be compiled
        patch.delattr(Target, "compile_layers")
        train(again)
    assert losses(again) == before
    with pytest.raises(InputError, match="hidden states of something else"):
        train(replace(run, run_name="other", target=TargetConfig(cache="disk")))


def test_a_cache_that_goes_meanwhile_is_made_compiled(
    cfg: Config, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the states are there is looked at once, where they are made."""
    folder = paths.features_dir(cfg)
    folder.mkdir(parents=True)
    (folder / "index.json").touch()
    compiled: list[int] = []

    def make(folder: Path, states: Any, *_: Any) -> None:
        states([torch.zeros(1).long()])

    monkeypatch.setattr(stage, "make_cache", make)
    monkeypatch.setattr(stage, "from_disk", lambda *_: None)
    monkeypatch.setattr(Target, "compile_layers", lambda self: compiled.append(1))
    cfg.target = TargetConfig(compile=True, cache="disk")
    run = TrainingRun(folder, stage.fingerprint_of(cfg, tokens), Ranks(0, 1))
    target = load_target(cfg.model, torch.device("cpu"))
    stage.states_of(cfg, target, stage.read_tokens(tokens)[1], run)
    assert compiled


@pytest.mark.slow
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config, "force_disable_caches", True)
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    target = Target(build(FAMILIES["Llama 2"]()).eval().requires_grad_(False), [0, 3, 7])
    with pytest.raises(InputError, match=r"target.compile=true: .* cannot be compiled here"):
        target.compile_layers()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [{"pack_tokens": 8}, {"shard": True}, {"engine": "vllm", "placement": "ray"}],
    ids=str,
)
def test_refusals(options: dict[str, Any]) -> None:
    key = next(iter(options))
    with pytest.raises(InputError, match=rf"target.compile=true and target.{key}=.* exclude"):
        TargetConfig(compile=True, **options)
