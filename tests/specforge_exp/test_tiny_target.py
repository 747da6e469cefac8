"""The recipe of the tiny target: its first steps, from the corpus on, are those on record."""

import json
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import REPOSITORY
from safetensors.torch import load_file

FOLDER = REPOSITORY / "assets" / "tiny_target"
READ, TUNED = [(10, 6.12406), (20, 5.71769)], [(10, 5.70000)]
"""Step, and the mean loss of the ten steps to it."""
HELD_OUT = 5.59098
"""Of the answers, after both."""


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(words: list[str]) -> None:
    process = warm.start([*words], kind="stages", together=True)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.mark.slow
def test_twenty_steps_are_those_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both trainings by their commands; tokenizer and configuration are the committed bytes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from make import make

    out, runs = tmp_path / "out", tmp_path / "work" / "checkpoints"
    make(out, tmp_path / "work", (20, 10), run)
    read, tuned = logged(runs / "read"), logged(runs / "tuned")
    for lines, expected in ((read, READ), (tuned, TUNED)):
        found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        assert found == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in expected]
    assert tuned[-1]["eval/loss"] == pytest.approx(HELD_OUT, rel=1e-3)
    files = {file.name for file in out.iterdir()}
    assert files == {file.name for file in FOLDER.iterdir() if file.is_file()} - {"make.py"}
    for name in files - {"model.safetensors"}:
        assert (out / name).read_bytes() == (FOLDER / name).read_bytes(), name
    ours, theirs = (load_file(place / "model.safetensors") for place in (out, FOLDER))
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()} == described
