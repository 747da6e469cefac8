"""The pipeline on a real Modal account: `pytest -m live`, one H100 for some minutes, about 2 USD.

Data sets and runs lie on the account's own Volumes under the names of experiment=smoke.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

STAGES = ["prefetch", "prep", "regen", "preprocess", "train", "export", "bench"]
KNOWN = bool(os.environ.get("MODAL_TOKEN_ID")) or (Path.home() / ".modal.toml").exists()
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not KNOWN, reason="no Modal token: `modal setup` makes one"),
]


def launch(stage: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A stage with -m, with the hub reachable and artifacts here out of the way."""
    online = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    roots = {f"SPECFORGE_{n.upper()}": str(folder / n) for n in ("datasets", "checkpoints")}
    command = [sys.executable, str(REPOSITORY / f"{stage}.py"), "-m", "experiment=smoke"]
    return subprocess.run(
        [*command, "hydra/launcher=modal", *overrides], env={**online, **roots}, cwd=REPOSITORY,
        capture_output=True, text=True, check=False, timeout=1500,
    )  # fmt: skip


def test_set_up(tmp_path: Path) -> None:
    done = launch("train", tmp_path, "hydra.launcher.setup=true")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage: str, tmp_path: Path) -> None:
    """In order: each needs what the ones before left on the Volumes. Forced: made anew."""
    again = {"train": ["trainer.resume=false"], "prefetch": []}
    done = launch(stage, tmp_path, *again.get(stage, [f"{stage}.force=true"]))
    assert done.returncode == 0, done.stderr
    assert "jobs completed" in done.stderr


def test_detached_then_attached(tmp_path: Path) -> None:
    """The launching process ends; another one brings the results."""
    done = launch("bench", tmp_path, "bench.force=true", "hydra.launcher.detach=true")
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "checkpoints" / "sweeps" / "smoke_qwen3_0_6b" / "bench"
    attach = [sys.executable, "-m", "modal_sweep", "attach", str(sweep)]
    later = subprocess.run(
        attach, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=1500
    )
    assert later.returncode == 0, later.stderr
    assert (sweep / "smoke_qwen3_0_6b_baseline" / "bench.log").exists()
