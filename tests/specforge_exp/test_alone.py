"""One side of a split alone: its figures are printed, no file is made or touched."""

from dataclasses import replace
from pathlib import Path

import pytest
import warm
from conftest import REPOSITORY, SMALL
from test_inputs import job

from specforge_exp.config import Config, TargetConfig, TrainerConfig
from specforge_exp.errors import InputError
from specforge_exp.inputs import check_jobs


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_trainer_alone(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """Two processes on random numbers. Of a run with its name nothing is read or touched."""
    run = tmp_path / "checkpoints" / "test"
    (run / "step-000002").mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl", "train.log"):
        (run / name).write_text("{")
    before = files(tmp_path)
    done = warm.run(
        [str(REPOSITORY / "train.py"), "experiment=smoke", "model=tiny", "loss=baseline",
         *SMALL, "max_length=256", "run_name=test", f"paths.datasets={tokens.parent}",
         f"paths.checkpoints={run.parent}", "trainer.batch_size=4", "trainer.gpus=2",
         "target.placement=ray", "target.alone=trainer", "max_steps=3", "trainer.save_every=1"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "target.alone=trainer: steps 2, seconds per step " in done.stdout + done.stderr
    assert "so no loss means anything, nothing is kept" in done.stdout + done.stderr
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("target", "trainer", "message"),
    [
        ({"share": "sweep"}, {}, "target.share=none, not sweep"),
        ({"dry_run": True}, {}, "target.dry_run=false, not true"),
        ({"profile": [1, 2]}, {}, r"target.profile=\[\], not \[1, 2\]"),
        ({}, {"resume": False}, "trainer.resume=true, not false"),
        ({}, {"restarts": 1}, "trainer.restarts=0, not 1"),
        ({}, {"dump": [1]}, r"trainer.dump=\[\], not \[1\]"),
    ],
)
def test_refusals(
    cfg: Config, target: dict[str, object], trainer: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=f"target.alone=workers needs {message}: it is no run"):
        replace(
            cfg,
            target=TargetConfig(placement="ray", alone="workers", **target),  # type: ignore[arg-type]
            trainer=TrainerConfig(**trainer),  # type: ignore[arg-type]
        )


def test_it_is_for_one_command_with_workers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"target\.alone needs target\.placement=ray"):
        TargetConfig(alone="trainer")
    with pytest.raises(InputError, match=r"target\.alone is for one command without -m"):
        check_jobs("train", [job(tmp_path, target={"placement": "ray", "alone": "trainer"})])  # type: ignore[list-item]
