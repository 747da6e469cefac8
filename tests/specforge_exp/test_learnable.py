"""A split from which a draft learns nothing is refused; a part of one is counted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_exp import paths
from specforge_exp.config import Config
from specforge_exp.data.tokens import read_split
from specforge_exp.drafts.dflash import blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.eagle3 import training
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.errors import InputError
from specforge_exp.stages.train import train
from specforge_exp.training.batches import Batch
from specforge_exp.training.learnable import nothing_to_learn
from specforge_exp.training.progress import means

EAGLE3 = Eagle3Config(name="eagle3", draft_vocab_size=512, ttt_length=3)
DFLASH = DFlashConfig(
    name="dflash", block_size=4, num_layers=1, num_features=3, draft_vocab_size=512
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=4))
def test_it_agrees_with_what_training_counts(parts: list[tuple[int, int]]) -> None:
    """Questions and answers of these lengths."""
    turns = [turn for n, (ask, say) in enumerate(parts, 1) for turn in [0] * ask + [n] * say]
    turns_T = torch.tensor(turns)
    batch = Batch(torch.zeros_like(turns_T), turns_T, [0], [len(turns)], 0)
    for cfg, denominators in ((EAGLE3, training.denominators), (DFLASH, blocks.denominators)):
        counted = float(denominators(cfg, batch).sum())
        part = turns_T, torch.tensor([len(turns)])
        assert bool(nothing_to_learn(cfg, [part])) == (counted == 0)


def test_the_reasons_are_counted() -> None:
    short, alone = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0, 2, 0, 3, 0, 4] * 2)
    long = torch.tensor([0] + [1] * 9)

    def packed(*turns: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.cat(turns), torch.tensor([len(turn) for turn in turns]))]

    assert nothing_to_learn(EAGLE3, packed(short, alone, long)) == {
        "without two supervised tokens in a row": 1
    }
    assert nothing_to_learn(DFLASH, packed(short, short, alone, long)) == {
        "with fewer than 8 supervised tokens (draft.min_loss_tokens)": 2,
        "without two supervised tokens in a row": 1,
    }


def test_train_refuses_a_split_without_anything_to_learn(cfg: Config, tokens: Path) -> None:
    """Tokens that were made for another draft."""
    cfg.draft = replace(DFLASH, min_loss_tokens=100_000)
    with pytest.raises(InputError, match=r"tokens, train: .*nothing to learn from its 12 conv"):
        train(cfg)
    assert not (paths.run_dir(cfg) / "run.json").exists()


def test_train_counts_what_is_of_no_use(
    cfg: Config, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    least = 1 + min(int((turns > 0).sum()) for _, turns in read_split(tokens, "train"))
    cfg.draft, cfg.max_steps = replace(DFLASH, min_loss_tokens=least), 1
    caplog.set_level("INFO")
    train(cfg)
    record = json.loads((paths.run_dir(cfg) / "run.json").read_text())
    (counted,) = record["nothing_to_learn"]["train"].items()
    assert counted[0] == f"with fewer than {least} supervised tokens (draft.min_loss_tokens)"
    assert 0 < counted[1] < 12
    assert f"nothing to learn in train: {counted[1]} with fewer than {least}" in caplog.messages[-1]


def test_the_simulated_length_is_never_below_one() -> None:
    zero = torch.zeros(3)
    sums = {"rows": zero, "length": torch.tensor(0.0), "length_slots": torch.tensor(0)}
    found = means({**sums, "alpha": zero})
    assert (found["simulated_length"], found["alpha"]) == (1.0, 0.0)
