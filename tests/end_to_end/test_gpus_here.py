"""What a machine without enough GPUs says, and that its remedies are commands."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from test_conf import composed, run

from specforge_exp.config import Config
from specforge_exp.config.machine import command
from specforge_exp.errors import InputError
from specforge_exp.stages.bench import bench
from specforge_exp.stages.regen import regen
from specforge_exp.stages.train import train
from specforge_exp.target import check_gpus, take_what_is_there


@pytest.mark.parametrize("stage", [train, regen, bench])
def test_refused_before_anything_is_read(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=f"on Modal: python {stage.__name__}.py -m"):
        stage(composed("paths.datasets=/nowhere", "engine=transformers"))


def test_refused_at_once_without_a_gpu(tmp_path: Path) -> None:
    stage = "train"
    done = run(
        f"{stage}.py", "hydra/launcher=basic", "loss=mixed", f"paths.checkpoints={tmp_path}",
        f"paths.datasets={tmp_path}", environment={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    options = f"loss=mixed paths.checkpoints={tmp_path} paths.datasets={tmp_path}"
    script = f"python {REPOSITORY / stage}.py"  # as it was typed
    assert f"on Modal: {script} -m {options};" in error
    assert f"{script} hydra/launcher=basic {options} device=cpu; or with a tiny target" in error


SINGLE = ["model=qwen3_8b", "hydra/launcher=basic", "loss=full-opd"]


@pytest.mark.parametrize(
    "words", [SINGLE, ["-m", "--config-dir", "conf", *SINGLE, "lr=3e-5,5e-5"]], ids=len
)
def test_remedies_compose(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in a message is one that Hydra takes, for all the runs of the one that was typed;
    what is for here keeps the launcher for here, what is for Modal does not."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    here = shlex.split(command("train", "device=cpu", away=False))[1:]
    away = shlex.split(command("train"))[1:]
    assert here == ["train.py", *words, "device=cpu"]
    rest = [word for word in words if word not in ("-m", "hydra/launcher=basic")]
    assert away == ["train.py", "-m", *rest]
    for line in (here, away):
        dry = ["hydra.sweeper.dry_run=true"] if "-m" in line else ["--cfg", "job"]
        done = run(*line, *dry)
        assert done.returncode == 0, done.stderr
        assert ("2 runs" in done.stdout) == (len(words) > 3)


VLLM = ["target.placement=ray", "target.engine=vllm"]


@pytest.mark.parametrize(
    ("gpus", "overrides", "refused"),
    [
        (0, [], "torch sees none"),
        (0, ["device=cpu"], None),
        (0, ["model=tiny"], None),
        (0, ["model=tiny", "trainer.batch_size=2", "trainer.gpus=2"], None),
        (8, [], None),
        (3, [], "use trainer.gpus=2, the most that share trainer.batch_size=8 evenly"),
        (4, [], "use trainer.gpus=4"),
        (1, ["resources=h100"], None),
        (8, ["target.placement=ray", "target.workers=4"], None),
        (4, ["target.placement=ray", "target.workers=4"], "this machine has 4: trainer.gpus=1 "
                                                           "target.workers=3"),
        (1, ["target.placement=ray", "trainer.gpus=1"], "has 1: target.placement=inprocess"),
        (8, [*VLLM, "target.workers=2", "target.tp_size=2"], None),
        (4, [*VLLM, "target.workers=2", "target.tp_size=2"], "trainer.gpus=2 target.workers=1"),
        (4, [*VLLM, "target.tp_size=4"], "has 4: a machine with more, or a smaller target.tp_size"),
    ],
)  # fmt: skip
def test_gpus_here(
    gpus: int, overrides: list[str], refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cfg: Config = composed(*overrides)
    if refused is None:
        check_gpus(cfg, "train", cfg.trainer.gpus)
        return
    with pytest.raises(InputError, match=refused):
        check_gpus(cfg, "train", cfg.trainer.gpus)


@pytest.mark.parametrize(
    ("gpus", "overrides", "taken"),
    [(0, ["model=tiny"], 1), (8, [], 8), (3, [], 2), (7, ["trainer.batch_size=7"], 7)],
)
def test_auto_takes_what_is_there(
    gpus: int, overrides: list[str], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cfg: Config = composed("trainer.gpus=auto", *overrides)
    assert take_what_is_there(cfg).trainer.gpus == taken
    assert take_what_is_there(replace(cfg, device="cpu")).trainer.gpus == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # torchrun's
    assert take_what_is_there(cfg).trainer.gpus == 1
    with pytest.raises(
        InputError, match=r"trainer\.gpus=all is not valid; it is a number, or auto"
    ):
        composed("trainer.gpus=all")
