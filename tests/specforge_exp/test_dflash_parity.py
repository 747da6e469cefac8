"""DFlash against losses and gradients recorded from the peers, and the benchmark's own half.

`python -m peers.<peer>_dflash_step INPUTS --record FILE` made the files in tests/parity/dflash.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import our_dflash_step
import parity
import pytest
import torch
from peers.dflash_inputs import Shape, label_weights, make_chats, make_weights, packed_anchors
from peers.inputs import load, save

from specforge_exp.drafts.dflash import draft as seam

FOLDER = Path(__file__).parents[1] / "parity" / "dflash"
FILES = sorted(FOLDER.glob("*.npz"))
BENCHMARKS = Path(our_dflash_step.__file__).parent
OF_THE_TARGET = {"embed_tokens.weight", "lm_head.weight"}
SHAPE = Shape(
    hidden=32, inter=40, heads=4, kv_heads=2, head_dim=8, vocab=96,
    features=3, layers=2, block_size=5, loss_gamma=3.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` puts the file's blocks in its place; what stood there comes back."""
    monkeypatch.setattr(seam, "make_blocks", seam.make_blocks)


def step(path: Path, loss: str, shape: dict[str, Any], divisor: float | None) -> Any:
    """Our draft after one forward and backward, and the loss."""
    args = argparse.Namespace(file=path, shape=json.dumps(shape), loss=loss, divisor=divisor)
    args.device, args.checkpointing = "cpu", False
    draft, outcome, extra = our_dflash_step.prepare(args)
    found = outcome()
    found.loss.backward()
    return draft, float(found.loss.detach()) - extra


def differences(path: Path) -> tuple[float, float]:
    """Of the loss, relative, and of the gradients, relative to the largest entry of each."""
    arrays = np.load(path, allow_pickle=False)
    meta = json.loads(str(arrays["meta"]))
    weights = {key[2:] for key in arrays.files if key.startswith("w/")}
    assert {key[2:] for key in arrays.files if key.startswith("g/")} == weights - OF_THE_TARGET
    assert all(abs(arrays[key]).max() > 0 for key in arrays.files if key.startswith("g/")), meta
    found = parity.compare(path)
    return found["loss_rel"], found["grad_rel"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_concatenate_norm_rotate_is_the_peers_order(path: Path) -> None:
    """R5: context and block through one projection, then the keys' norm, then the rotation: loss
    and every gradient of two packed conversations are the peer's."""
    assert len(FILES) == 12
    loss, gradient = differences(path)
    assert loss <= 2e-6
    assert gradient <= 1e-5


def test_another_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation before the norm has the same size in every head and is still not the same."""
    from specforge_exp.drafts.dflash import attention, heads

    monkeypatch.setattr(
        attention,
        "turned",
        lambda norm, x, angles: norm(heads.rotate(x, *angles)),
    )
    loss, gradient = differences(FOLDER / "specforge_hard.npz")
    assert loss > 1e-5 and gradient > 1e-3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two conversations, half prompt."""
    weights = make_weights(SHAPE, seed=0)
    chats = make_chats(SHAPE, weights["lm_head.weight"], [16, 24], 0.5, 2)
    save(tmp_path / "inputs.npz", weights, chats)
    return tmp_path / "inputs.npz"


def test_the_text_is_what_the_target_would_say(file: Path) -> None:
    """Otherwise a label of the text is not the target's best token, and losses differ by peer."""
    weights, chats = load(file)
    for row, length in enumerate(chats.lengths):
        logits = chats.last_BTH[row] @ weights["lm_head.weight"].T
        assert torch.equal(logits.argmax(-1)[: length - 1], chats.ids_BT[row, 1:length])
    rms = chats.last_BTH.pow(2).mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 2.0))


def test_anchors_are_those_that_everybody_may_draw(file: Path) -> None:
    _, chats = load(file)
    for anchors, mask, length in zip(chats.anchor_BR, chats.mask_BT, chats.lengths, strict=True):
        drawn = anchors[anchors >= 0]
        assert 0 < len(drawn) <= length // 2
        assert mask[drawn].all() and mask[drawn + 1].all()
        assert (drawn + SHAPE.block_size <= length).all()
        assert drawn.unique().tolist() == drawn.tolist()
    packed = packed_anchors(chats)
    assert len(packed) == int((chats.anchor_BR >= 0).sum())
    assert packed.max() == chats.anchor_BR[1].max() + 16


@pytest.mark.slow
def test_our_step_prints_one_line_of_json(file: Path) -> None:
    """Rows and loss are those of the file's blocks, at the sum of their weights."""
    command = [sys.executable, "-m", "our_dflash_step", str(file), "--threads", "1", "--steps", "1"]
    done = subprocess.run(
        [*command, "--shape", json.dumps(vars(SHAPE))],
        cwd=BENCHMARKS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"who", "cpu_s", "wall_s", "activation_mb", "loss", "rows", "matmul_share"} <= set(found)
    rows, weight = label_weights(SHAPE, load(file)[1])
    assert found["rows"] == rows
    _, expected = step(file, "hard", vars(SHAPE), weight)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
