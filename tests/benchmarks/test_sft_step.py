"""The benchmark's own half: conversations that everybody gets, our step on them, fair ratios."""

import json
import sys
from pathlib import Path

import pytest
import torch
import warm
from our_sft_step import prepare
from sft_step import TINY, parsed, ratios, write_inputs
from train_step import run
from transformers import AutoModelForCausalLM

LENGTHS = [12, 5, 20]


def test_our_step_is_the_loss_that_the_peers_report(tmp_path: Path) -> None:
    """-log q over the answers' tokens of the padded batch, as `labels=` has it."""
    write_inputs(tmp_path, TINY, LENGTHS)
    chats = json.loads((tmp_path / "chats.json").read_text())
    assert [len(chat["ids"]) for chat in chats] == LENGTHS
    assert [sum(chat["mask"]) for chat in chats] == [6, 3, 10]
    causal, objective, batch = prepare(tmp_path, chats)
    count = objective.denominators(batch)
    outcome = objective.forward(batch, count)
    outcome.loss.backward()
    assert float(count[0]) == 6 + 3 + 10
    assert all(weight.grad is not None for weight in causal.parameters())

    ids_BT, labels_BT, seen_BT = (torch.full((3, 20), value) for value in (0, -100, 0))
    for row, chat in enumerate(chats):
        ids_T, mask_T = torch.tensor(chat["ids"]), torch.tensor(chat["mask"]).bool()
        ids_BT[row, : len(ids_T)], seen_BT[row, : len(ids_T)] = ids_T, 1
        labels_BT[row, : len(ids_T)] = torch.where(mask_T, ids_T, -100)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = model(ids_BT, attention_mask=seen_BT, labels=labels_BT).loss
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_our_step_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the script's own arguments."""
    monkeypatch.setattr(sys, "executable", warm.python("our_sft_step"))
    write_inputs(tmp_path, TINY, LENGTHS)
    (measured,) = run(tmp_path, parsed(["--steps", "1", "--threads", "1"]), ("our_sft_step",))
    assert measured["rows"] == 6 + 3 + 10 and measured["cpu_s"] > 0


def test_ratios_are_to_the_better_peer() -> None:
    peers = [
        {"cpu_s": 4.0, "activation_mb": 900.0, "loss": 2.0},
        {"cpu_s": 5.0, "activation_mb": 600.0, "loss": 2.02},
    ]
    ours = {"cpu_s": 3.0, "activation_mb": 150.0, "loss": 2.0}
    assert ratios(ours, peers) == {
        "cpu_ratio": 0.75, "activation_ratio": 0.25, "loss_rel": pytest.approx(0.01),
    }  # fmt: skip
