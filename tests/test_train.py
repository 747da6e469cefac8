"""The training loop: it learns, resumes where it was, and refuses what does not belong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from specforge_exp import paths
from specforge_exp.checkpoint import newest_checkpoint, read_checkpoint, step_folders
from specforge_exp.config import Config, TrainerConfig
from specforge_exp.errors import InputError
from specforge_exp.stages.train import train
from specforge_exp.training import loop
from specforge_exp.training.batches import epoch_order
from specforge_exp.training.schedule import learning_rate


def metrics(cfg: Config) -> list[dict[str, Any]]:
    file = paths.run_dir(cfg) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(cfg: Config) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in metrics(cfg) if "loss" in m}


@pytest.fixture
def run(cfg: Config, tokens: Path) -> Config:
    """Twelve conversations, batches of 2, two of them a window: three steps an epoch."""
    cfg.trainer = TrainerConfig(
        batch_size=2, accumulate=2, log_every=1, eval_every=4, save_every=2, keep_last=2
    )
    cfg.epochs = 3
    return cfg


def test_training_learns_and_leaves_a_record(run: Config) -> None:
    length = train(run)
    found = losses(run)
    assert list(found) == list(range(1, 10))
    assert found[9] < 0.8 * found[1]
    folder = paths.run_dir(run)
    assert [f.name for f in step_folders(folder)] == ["step-000008", "step-000009"]
    record = json.loads((folder / "run.json").read_text())
    assert record["evaluation"]["simulated_length"] == length > 1
    lines = metrics(run)
    assert {"lr", "grad_norm", "ce", "alpha/0", "top1/2", "simulated_length"} <= set(lines[0])
    assert any("eval/loss" in line for line in lines)


def test_complete_is_reused(run: Config) -> None:
    run.max_steps = 2
    first = train(run)
    stamp = (paths.run_dir(run) / "step-000002").stat().st_mtime_ns
    assert train(run) == first
    assert (paths.run_dir(run) / "step-000002").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"lr was 0\.001, now 0\.002.*trainer\.resume=false"):
        train(replace(run, lr=2e-3))


def test_the_last_line_is_a_mean_too(run: Config) -> None:
    """Five steps in lines of three: the second line averages two."""
    run.max_steps = 5
    train(run)
    single = losses(run)
    coarse = replace(run, run_name="coarse", trainer=replace(run.trainer, log_every=3))
    train(coarse)
    assert losses(coarse)[5] == pytest.approx((single[4] + single[5]) / 2)


class Stop(Exception):
    """Stands for a kill at some step."""


def test_resumed_equals_uninterrupted(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after step 5, continued from the checkpoint of step 4: the same losses after."""
    train(run)
    expected = losses(run)
    again = replace(run, run_name="again")
    original = loop.learning_rate

    def stop(step: int, *rest: Any) -> float:
        if step == 5:
            raise Stop
        return original(step, *rest)

    monkeypatch.setattr(loop, "learning_rate", stop)
    with pytest.raises(Stop):
        train(again)
    assert list(losses(again)) == [1, 2, 3, 4, 5]
    monkeypatch.setattr(loop, "learning_rate", original)
    train(again)
    assert losses(again) == expected


def test_a_truncated_checkpoint_falls_back(run: Config, caplog: pytest.LogCaptureFixture) -> None:
    train(run)
    folder = paths.run_dir(run)
    newest = folder / "step-000009" / "draft.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    found = newest_checkpoint(folder)
    assert found is not None
    assert found.step == 8
    assert "step-000009" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(run: Config) -> None:
    run.max_steps = 2
    train(run)
    (paths.run_dir(run) / "run.json").unlink()
    with pytest.raises(InputError, match=r"seed was 0, now 1.*trainer\.resume=false"):
        train(replace(run, seed=1))
    fresh = replace(run, seed=1, max_steps=1, trainer=replace(run.trainer, resume=False))
    assert train(fresh) > 1
    assert [f.name for f in step_folders(paths.run_dir(run))] == ["step-000001"]


def test_the_first_step_is_the_gradient_of_the_formula(run: Config) -> None:
    """Accumulating four windows of one batch equals one window's batch of all (one divisor)."""
    one = replace(run, run_name="one", max_steps=1)
    one.trainer = replace(run.trainer, batch_size=1, accumulate=12)
    all_at_once = replace(run, run_name="all", max_steps=1)
    all_at_once.trainer = replace(run.trainer, batch_size=12, accumulate=1)
    train(one)
    train(all_at_once)
    assert losses(one)[1] == pytest.approx(losses(all_at_once)[1], rel=1e-5)
    a, b = (newest_checkpoint(paths.run_dir(c)) for c in (one, all_at_once))
    assert a is not None
    assert b is not None
    for name in a.draft:
        moment = f"{name}:exp_avg"
        if moment in a.optimizer:
            reference = a.optimizer[moment]
            scale = float(reference.abs().max())
            assert float((reference - b.optimizer[moment]).abs().max()) <= 1e-4 * scale


def test_a_bfloat16_target_trains_an_fp32_draft(run: Config) -> None:
    run.max_steps = 2
    run.model = replace(run.model, dtype="bfloat16")
    assert train(run) > 1
    found = newest_checkpoint(paths.run_dir(run))
    assert found is not None
    assert {value.dtype for name, value in found.draft.items() if "weight" in name} == {
        torch.float32
    }


def test_missing_tokens_name_the_command(cfg: Config) -> None:
    with pytest.raises(InputError, match=r"index\.json does not exist.*python preprocess\.py"):
        train(cfg)


def test_too_few_layers(run: Config, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow"
    shallow.mkdir()
    for file in Path(run.model.path).glob("*.*"):
        if file.is_file():
            (shallow / file.name).write_bytes(file.read_bytes())
    config = json.loads((shallow / "config.json").read_text())
    config["num_hidden_layers"] = 5
    config["layer_types"] = config.get("layer_types", [])[:5] or None
    (shallow / "config.json").write_text(json.dumps(config))
    run.model = replace(run.model, path=str(shallow))
    with pytest.raises(InputError, match=r"5 layers.*model\.aux_layers"):
        train(run)


def test_a_target_that_is_not_there(run: Config) -> None:
    run.model = replace(run.model, path="no/such-model")
    with pytest.raises(InputError, match=r"model\.path=no/such-model cannot be loaded"):
        train(run)


def test_no_pickle_is_read(run: Config) -> None:
    run.max_steps = 2
    train(run)
    suffixes = {p.suffix for p in (paths.run_dir(run) / "step-000002").iterdir()}
    assert suffixes == {".safetensors", ".json"}
    assert read_checkpoint(paths.run_dir(run) / "step-000002").step == 2


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 3))
def test_every_conversation_once_an_epoch(lengths: list[int], size: int, epoch: int) -> None:
    order = epoch_order(lengths, size, seed=4, epoch=epoch)
    assert sorted(n for batch in order for n in batch) == list(range(len(lengths)))
    assert order == epoch_order(lengths, size, seed=4, epoch=epoch)
    assert all(len(batch) <= size for batch in order)


def test_learning_rate() -> None:
    cfg = TrainerConfig(warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [learning_rate(step, 100, 1.0, cfg) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(run: Config, tmp_path: Path) -> None:
    """A real process, killed with SIGKILL once a checkpoint is there, then started again."""
    overrides = [
        "experiment=smoke", "loss=baseline", f"paths.datasets={run.paths.datasets}",
        f"paths.checkpoints={tmp_path / 'killed'}", "run_name=killed", "data.name=small",
        "max_length=256", "draft.ttt_length=3", "max_steps=30", "epochs=30", "lr=1e-3",
        "trainer.batch_size=2", "trainer.log_every=1", "trainer.save_every=1",
    ]  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "train.py"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "killed" / "killed"
    process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    while not step_folders(folder) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "run.json").exists()
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert re.search(r"continuing after step \d+", done.stdout + done.stderr)
    steps = [
        json.loads(line)["step"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert steps == list(range(1, 31))
    third = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "complete, reused" in third.stdout + third.stderr


def test_loss_is_finite_or_training_stops(run: Config) -> None:
    run.lr = 1e30
    run.trainer.clip = 1e30
    with pytest.raises(InputError, match=r"the loss is (nan|inf).*lower lr"):
        train(run)
