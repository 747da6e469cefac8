"""Remembering the target's states changes no number."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import losses

from specforge_exp.config import Config, TrainerConfig
from specforge_exp.stages.train import train
from specforge_exp.target import Target
from specforge_exp.tokens import TokenSet
from specforge_exp.training.batches import make_batch
from specforge_exp.training.features import cached


def test_cached_and_live_training_give_the_same_losses(cfg: Config, tokens: Path) -> None:
    cfg.trainer = TrainerConfig(batch_size=3, log_every=1, eval_every=4)
    cfg.epochs = 3
    train(cfg)
    remembered = replace(cfg, run_name="remembered")
    remembered.trainer = replace(cfg.trainer, cache_features=True)
    train(remembered)
    assert losses(remembered) == pytest.approx(losses(cfg), rel=2e-5)


def test_the_target_runs_once_per_conversation(random_target: Target) -> None:
    calls: list[torch.Size] = []

    def features(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(ids.shape)
        return random_target.features(ids)

    lookup = cached(features)
    ids = [torch.arange(n) for n in (5, 9, 7)]
    tokens = TokenSet(ids, [torch.ones_like(i) for i in ids])
    device = torch.device("cpu")
    first = lookup(make_batch(tokens, [0, 1], device))
    again = lookup(make_batch(tokens, [0, 1], device))
    assert len(calls) == 1
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a[1], b[1])
        torch.testing.assert_close(a[0, :5], b[0, :5])
        assert not b[0, 5:].any()
    lookup(make_batch(tokens, [0, 1], device, held_out=True))
    lookup(make_batch(tokens, [2, 1], device))
    assert len(calls) == 3
