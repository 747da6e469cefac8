"""The benchmark's own half: fair inputs, a step that is SpecForge's, memory that is counted."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from shutil import which

import parity
import pytest
import torch
import train_step
import warm
from our_step import packed
from peers.counted import callgrind
from peers.inputs import Shape, load, make_chats, make_weights, save, vocabulary
from peers.measure import arguments, measure

from specforge_exp.config import LossConfig
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.losses import Loss, opd
from specforge_exp.target import Head

SIZES = {"hidden": 32, "inter": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 200}
SHAPE = Shape(**SIZES, draft_vocab=60, ttt=3)
BENCHMARKS = Path(parity.__file__).parent


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two conversations, half prompt."""
    weights = make_weights(SHAPE, seed=0)
    chats = make_chats(SHAPE, [12, 20], 0.5, seed=1)
    save(tmp_path / "inputs.npz", weights | vocabulary(SHAPE, weights, [chats]), chats)
    return tmp_path / "inputs.npz"


def test_every_best_token_is_in_the_drafts_vocabulary(file: Path) -> None:
    """Otherwise SpecForge drops rows, and a ratio compares different work."""
    weights, chats = load(file)
    best = (chats.last_BTH @ weights["target_head.weight"].T).argmax(-1)
    assert weights["t2d"][best].all()
    assert int(weights["t2d"].sum()) == SHAPE.draft_vocab
    ids = weights["d2t"] + torch.arange(SHAPE.draft_vocab)
    assert torch.equal(weights["t2d"].nonzero()[:, 0], ids)
    assert chats.mask_BT.sum(1).tolist() == [5, 9]


def test_packing_drops_padding_only(file: Path) -> None:
    """The padded batch's loss and gradients, from the packed row and the padded divisor."""
    weights, chats = load(file)
    head = Head(weights.pop("target_head.weight"))
    cfg = Eagle3Config(name="peer", ttt_length=3, supervision="specforge")
    loss = Loss(opd, LossConfig(name="peer", lambda_ce=1.0))
    found = []
    for lengths in (chats.lengths, [20, 20]):
        draft = parity.build_draft(dict(weights), vars(SHAPE))
        sample = packed(type(chats)(**{**vars(chats), "lengths": lengths}), "cpu", torch.float32)
        outcome = draft.objective(sample, head, loss, cfg, torch.full((3,), 40.0).double())
        outcome.loss.backward()
        found.append((outcome, draft.fc.weight.grad))
    (first, gradient), (second, padded) = found
    assert torch.equal(first.sums["rows"], second.sums["rows"])
    torch.testing.assert_close(first.loss, second.loss)
    torch.testing.assert_close(gradient, padded, rtol=1e-4, atol=1e-7)


def test_our_step_prints_one_line_of_json(file: Path) -> None:
    """In a process that loads what it needs itself."""
    command = [sys.executable, "-m", "our_step", str(file), "--shape", json.dumps(vars(SHAPE))]
    done = subprocess.run(
        [*command, "--threads", "1", "--steps", "1"],
        cwd=BENCHMARKS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"who", "cpu_s", "wall_s", "activation_mb", "loss", "rows", "matmul_share"} <= set(found)
    assert found["rows"] == 3 * (5 + 9)


def test_steps_take_turns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step for every line that a process is given, and nothing before it."""
    monkeypatch.setattr(sys, "executable", warm.python("our_step"))
    args = argparse.Namespace(
        shape=vars(SHAPE), threads=1, steps=2, device="cpu", peers_python=None, apart=False,
        instructions=False,
    )  # fmt: skip
    first, second = (train_step.Step("our_step", file, args) for _ in range(2))
    try:
        assert first.said == second.said == "ready\n"
        first.take_turn()
        assert (first.said, second.said) == ("ready\n", "ready\n")
        first.take_turn()
        second.take_turn()
        assert json.loads(first.said)["who"] == "ours"
        assert second.said == "ready\n"
        second.process.kill()
        with pytest.raises(SystemExit, match=r"ended by SIGKILL, .* --apart holds"):
            second.take_turn()
    finally:
        first.end()
        second.end()
    args.apart = True
    found = train_step.run(file, args, ("our_step",), ("our_step", "--checkpointing"))
    assert [each["who"] for each in found] == ["ours", "ours+checkpointing"]
    with pytest.raises(SystemExit, match=r"our_step failed:(.|\n)*unrecognized arguments: --no"):
        train_step.run(file, args, ("our_step", "--no"))


def test_activation_memory_is_what_a_step_holds() -> None:
    """128 MB that live during the step are counted, what stays from before is not."""
    kept = torch.ones(2**24)

    def step() -> None:
        held = torch.ones(2**24) + kept
        held.sum()

    found = measure(step, arguments("").parse_args(["-", "--steps", "3"]))
    assert 100 < found["activation_mb"] < 180
    assert found["cpu_s"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not which("valgrind"), reason="there is no valgrind")
def test_twice_the_work_has_twice_the_instructions(tmp_path: Path) -> None:
    """Whatever else the machine does, and without what the process does around a step."""
    counts = f"""
from pathlib import Path
from shutil import which
from peers.counted import instructions
out = Path({str(tmp_path / "out")!r})
print(*(instructions(lambda: sum(range(n)), out) for n in (10**5, 10**6)))
"""
    command = [*callgrind(tmp_path / "out"), sys.executable, "-c", counts]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert 6 < many / few < 11
