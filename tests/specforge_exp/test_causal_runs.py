"""pretrain and sft as commands: killed anywhere, on any layout, and exported as a plain model."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from conftest import REPOSITORY, SMALL, make_config
from holding import environment, hold, release
from test_checks import changed
from test_resume import finish, kill_all, lines, losses, run_of, start, wait_for_step
from transformers import AutoModelForCausalLM, AutoTokenizer

from specforge_exp.config import Config
from specforge_exp.errors import InputError

STEPS = 16

KILLS = int(os.environ.get("SPECFORGE_KILLS", "1"))
"""Of each training."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Token shards of the synthetic corpus with its own answers."""
    from specforge_exp.stages.prep import prep
    from specforge_exp.stages.preprocess import preprocess

    cfg = make_config(tmp_path_factory.mktemp("causal"))
    cfg.preprocess.source = "prep"
    prep(cfg)
    preprocess(cfg)
    return cfg


def command(cfg: Config, stage: str, name: str, *more: str) -> list[str]:
    """A stage on the fixture's tokens, or on templated text; 16 steps of four."""
    return [
        sys.executable, str(REPOSITORY / f"{stage}.py"), f"experiment={stage}_tiny",
        f"paths.datasets={Path(cfg.paths.datasets).resolve()}",
        f"paths.checkpoints={Path(cfg.paths.checkpoints).resolve()}", f"run_name={name}",
        *SMALL, "max_length=256", f"max_steps={STEPS}", "epochs=30",
        "trainer.batch_size=4", "trainer.pack_tokens=600", "trainer.log_every=1",
        "trainer.save_every=3", "trainer.eval_every=7", *more,
    ]  # fmt: skip


def whole(cfg: Config, stage: str, log: Path, gpus: int = 1) -> str:
    """The name of an uninterrupted run; whoever asks first trains it."""
    name = f"{stage}_whole_{gpus}"
    if not (run_of(cfg, name) / "run.json").exists():
        finish(command(cfg, stage, name, f"trainer.gpus={gpus}"), log)
    return name


def kill_at(step: int, arguments: list[str], cfg: Config, name: str, log: Path) -> None:
    """Start it and kill it when that step is logged, or a little later."""
    hold(run_of(cfg, name), step + 2)
    process = start(arguments, log)
    wait_for_step(process, cfg, name, step)
    kill_all(process)
    release(run_of(cfg, name))


@pytest.mark.parametrize(("stage", "kind"), [("sft", None), ("pretrain", "apps")])
def test_it_learns_and_is_exported(
    made: Config, stage: str, kind: str | None, tmp_path: Path
) -> None:
    """One of them in a process that loads torch itself."""
    said = finish(command(made, stage, f"{stage}_whole_1"), tmp_path / "log", kind)
    found = losses(made, f"{stage}_whole_1")
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert found[-1][1] < found[0][1] - 0.5
    assert re.search(r"step 16: loss \d\.\d+, [\d,]+ tokens/s, MFU \d+%", said)
    folder = Path(made.paths.checkpoints) / f"{stage}_whole_1"
    assert (folder / "step-000016").is_dir() and f"exported step 16: {folder / 'export'}" in said
    model = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    assert (
        tokenizer.chat_template and model.generation_config.eos_token_id == tokenizer.eos_token_id
    )
    evaluation = [line for line in lines(made, f"{stage}_whole_1") if "eval/loss" in line][-1]
    assert "Writing model shards" not in said  # a bar, where there is no terminal
    assert evaluation["eval/loss_low"] < evaluation["eval/loss"] < evaluation["eval/loss_high"]
    pairs = json.loads((folder / "evaluation.json").read_text())
    assert sum(pairs["loss"]) / sum(pairs["tokens"]) == pytest.approx(evaluation["eval/loss"])


@pytest.mark.parametrize(
    ("stage", "gpus"),
    [
        ("pretrain", 1),
        *(pytest.param(*each, marks=pytest.mark.slow)
          for each in (("sft", 1), ("sft", 2), ("pretrain", 2))),
    ],
)  # fmt: skip
def test_killed_at_random_steps(made: Config, stage: str, gpus: int, tmp_path: Path) -> None:
    """Kills, each followed by the same command; two processes share the weights (FSDP2)."""
    name, log = f"{stage}_{gpus}", tmp_path / "log"
    arguments = command(made, stage, f"{name}_killed", f"trainer.gpus={gpus}")
    for step in sorted(random.Random(7 * gpus).sample(range(4, STEPS - 2), KILLS)):
        kill_at(step, arguments, made, f"{name}_killed", log)
    assert re.search(r"continuing after step \d+", finish(arguments, log))
    assert losses(made, f"{name}_killed") == losses(made, whole(made, stage, log, gpus))


def test_what_is_complete_is_reused_and_what_is_damaged_made_again(
    made: Config, tmp_path: Path
) -> None:
    folders, log = Path(made.paths.checkpoints), tmp_path / "log"
    name = whole(made, "pretrain", log)
    shutil.copytree(folders / name, folders / "again")
    arguments = command(made, "pretrain", "again")
    assert "complete, reused" in finish(arguments, log)
    (folders / "again" / f"step-{STEPS:06d}" / "draft.safetensors").write_bytes(b"")
    remedy = f"make it again with: python {REPOSITORY}/pretrain.py"
    assert remedy in finish(arguments, log)
    assert losses(made, "again") == losses(made, name)


@pytest.mark.slow
def test_two_processes_are_one(made: Config, tmp_path: Path) -> None:
    """FSDP2 per layer over gloo, its tied embeddings and head one weight; and replicas."""
    log = tmp_path / "log"
    one, shared = (whole(made, "pretrain", log, gpus) for gpus in (1, 2))
    finish(command(made, "pretrain", "replicas", "trainer.gpus=2", "trainer.shard=false"), log)
    for name in (shared, "replicas"):
        assert dict(losses(made, name)) == pytest.approx(dict(losses(made, one)), rel=2e-4)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(Path(made.paths.checkpoints) / name / "export")
        for name in (shared, one)
    )
    for (name, own), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=0.05, atol=5e-3, msg=name)


@pytest.mark.parametrize(
    ("stage", "option", "words"),
    [
        ("pretrain", "max_steps=null", "a stream has no end: max_steps"),
        ("pretrain", "pretrain.sources=[]", "pretrain.sources is empty"),
        ("sft", "data.name=other", "make it with:"),
        ("sft", "max_length=128", "was made with other options: max_length was 256, now 128"),
        ("sft", "trainer.init=other", "sft begins with a model's folder: model.path="),
        ("pretrain", "trainer.init=other", "pretrain begins with a model's folder: model.path="),
        ("sft", "causal.beta2=1", "causal.beta2=1.0 must be below 1"),
        ("sft", "model=qwen2_5_0_5b", "preprocess.py experiment=sft_tiny"),
    ],
)
def test_refusals(made: Config, stage: str, option: str, words: str, tmp_path: Path) -> None:
    process = start(command(made, stage, "refused", option), tmp_path / "log")
    assert process.wait(300) == 1
    said = (tmp_path / "log").read_text()
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"export.push": "x/y"}, "sft needs export.push=none, not x/y"),
        ({"export.format": "speculators"}, "sft needs export.format=auto, not speculators"),
        ({"export.source": "a"}, "sft needs export.source=none, not a"),
        ({"onpolicy.name": "replay"}, "sft needs onpolicy=none, not replay"),
    ],
)
def test_what_is_for_drafts_alone(made: Config, values: dict[str, str], said: str) -> None:
    from specforge_exp.causal.training import check_start

    with pytest.raises(InputError, match=said):
        check_start(changed(made, values), "sft")


@pytest.mark.parametrize("option", [{"seed": 1}, {"seeds": 3}])
def test_a_seed_that_nothing_is_drawn_by(made: Config, option: dict[str, int]) -> None:
    """Repeats would be one run, shown as several without any spread."""
    from specforge_exp.stages.pretrain import begin

    with pytest.raises(InputError, match="change no number of a run that begins with the model's"):
        begin(replace(made, max_steps=2, **option), 1)


@pytest.mark.slow
def test_the_best_is_kept_and_exported(made: Config, tmp_path: Path) -> None:
    """Of a training whose rate is far too high at the end, beside the last one alone; its process
    loads torch itself."""
    more = [
        "max_steps=8", "lr=0.05", "trainer.schedule=constant", "trainer.eval_every=1",
        "trainer.save_every=2", "trainer.keep_last=1", "export.best=true",
    ]  # fmt: skip
    said = finish(command(made, "sft", "best", *more), tmp_path / "log", kind="apps")
    found = {n["step"]: n["eval/loss"] for n in lines(made, "best") if "eval/loss" in n}
    best = min(found, key=lambda step: found[step])
    assert len(found) == 8 and best < 8 and f"exported step {best}: " in said
    steps = (Path(made.paths.checkpoints) / "best").glob("step-*")
    assert {int(step.name[5:]) for step in steps} == {best, 8}


@pytest.mark.slow
def test_submitit_runs_the_same(made: Config, tmp_path: Path) -> None:
    """hydra/launcher=submitit_slurm's local form; its job is the training of a single call."""
    more = ["-m", "hydra/launcher=submitit_local", "sweep_name=submitted"]
    said = finish(command(made, "pretrain", "submitted", *more), tmp_path / "log")
    assert re.search(r"^1 +submitted .* completed", said, re.M), said
    alone = whole(made, "pretrain", tmp_path / "log")
    assert losses(made, "submitted") == losses(made, alone)
    sweep = Path(made.paths.checkpoints) / "sweeps" / "submitted" / "pretrain"
    assert list(sweep.glob(".submitit/*/*.pkl")) and (sweep / "report.html").exists()
    table = (sweep / "report.csv").read_text().splitlines()
    assert "loss" in table[0] and len(table) == 2


@pytest.mark.slow
def test_slurm_requeues_what_was_stopped(made: Config, tmp_path: Path) -> None:
    """runs/slurm.sh over a fake srun and scontrol: a time limit, then the same job again."""
    for name, text in (
        ("srun", 'exec "$@"'),
        ("scontrol", f'[ "$1" = requeue ] && touch {tmp_path}/requeued || echo localhost'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    words = command(made, "pretrain", "slurm", "trainer.gpus=1")[1:]
    python = warm.python("torch.distributed.run", "pretrain.py")
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": python, "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost",
        "PYTHON_EXEC": python,  # torchrun's, of what it starts
    }  # fmt: skip
    job = ["env", *(f"{k}={v}" for k, v in env.items()), "bash", "runs/slurm.sh", *words]
    hold(run_of(made, "slurm"), 5)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(job, env=environment(), cwd=REPOSITORY, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not any(step >= 5 for step, _ in losses(made, "slurm")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(300) == 0 and (tmp_path / "requeued").exists()
        assert len(losses(made, "slurm")) < STEPS
        release(run_of(made, "slurm"))
        subprocess.run(job, cwd=REPOSITORY, stdout=log, stderr=log, check=True)
    assert re.search(r"continuing after step \d+", (tmp_path / "log").read_text())
    alone = whole(made, "pretrain", tmp_path / "whole")
    assert losses(made, "slurm") == losses(made, alone)
