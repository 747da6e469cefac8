"""The pipeline on a local Modal: every stage in a container, artifacts on Volumes only."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import warm
from conftest import REPOSITORY
from modal_local.client import LocalModal

STAGES = ["prefetch", "prep", "regen", "preprocess", "train", "export", "bench"]


def launch(stage: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """One command with -m; its artifacts here would go to `folder`."""
    roots = {f"SPECFORGE_{n.upper()}": str(folder / n) for n in ("datasets", "checkpoints")}
    command = [str(REPOSITORY / f"{stage}.py"), "-m", *overrides]
    return warm.run(command, env={**os.environ, **roots})


SMOKE = ["experiment=smoke", "model=tiny", "hydra/launcher=modal"]


@pytest.mark.slow
def test_the_pipeline(on_local_modal: LocalModal, tmp_path: Path) -> None:
    """Early: the missing input is named with its command. In order: two drafts, two tables."""
    early = launch("train", tmp_path, *SMOKE)
    assert early.returncode == 1
    remedy = f"{REPOSITORY / 'preprocess.py'} -m experiment=smoke model=tiny hydra/launcher=modal"
    assert remedy in early.stderr, early.stderr
    roots = {f"SPECFORGE_{n.upper()}": str(tmp_path / n) for n in ("datasets", "checkpoints")}
    smoke = subprocess.run(  # what `make modal-smoke` runs on a Modal of this machine
        ["bash", "runs/modal_smoke.sh", "model=tiny"],
        env={**os.environ, **roots, "OMP_NUM_THREADS": "1", "SPECFORGE_SMOKE_HERE": "1",
             "PYTHON": warm.python(*(f"{stage}.py" for stage in STAGES), kind="modal")},
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert smoke.returncode == 0, smoke.stdout
    parts = re.split(r"^== (\w+)$", smoke.stdout, flags=re.M)[1:]
    assert parts[::2] == STAGES
    for stage, said in zip(STAGES, parts[1::2], strict=True):
        count = 2 if stage in ("train", "export", "bench") else 1
        assert f"{count} of {count} jobs completed" in said
        assert "here with: modal-sweep pull --checkpoints" in said or stage == "prefetch"
    server = "tests/speculating_server.py"
    served = launch(
        "bench", tmp_path, *SMOKE, "loss=baseline", "engine=sglang", "bench.alone=false",
        f'engine.command=[python,/root/{server},--model,"{{model}}",--draft,"{{draft}}",--port,"{{port}}"]',
        f"resources.image.sources=[specforge_exp,assets,benchmarks/published.yaml,{server}]",
    )  # fmt: skip
    assert served.returncode == 0, served.stderr
    said = (tmp_path / "checkpoints/sweeps/smoke_tiny/bench").glob("smoke_tiny_baseline/bench.log")
    assert "bench: the server starts" in "".join(log.read_text() for log in said)
    assert not (tmp_path / "datasets").exists()
    logs = sorted((tmp_path / "checkpoints/sweeps/smoke_tiny/train").glob("*/train.log"))
    assert [log.parent.name for log in logs] == ["smoke_tiny_baseline", "smoke_tiny_full-opd"]
    assert all("train: complete: /root/.cache/specforge" in log.read_text() for log in logs)


@pytest.mark.slow
@pytest.mark.usefixtures("cold_containers")
def test_what_lies_here_is_uploaded(on_local_modal: LocalModal, tmp_path: Path) -> None:
    options = ["experiment=smoke", "model=tiny", "data.name=uploaded"]
    for stage, *more in (["prep"], ["preprocess", "preprocess.source=prep"]):
        done = launch(stage, tmp_path, *options, *more)
        assert done.returncode == 0, done.stderr
    away = [*options, "hydra/launcher=modal", "loss=mixed"]
    dry = launch("train", tmp_path, *away, "hydra.launcher.dry_run=true")
    assert "would upload" in dry.stderr and dry.returncode == 0
    done = launch("train", tmp_path, *away)
    assert done.returncode == 0, done.stderr
    assert "uploaded--tiny.tokens" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_report_shows_what_the_jobs_returned(on_local_modal: LocalModal, tmp_path: Path) -> None:
    """A finished run here has the name of a job that trains less on Modal: the table has the
    job's own value, with an interval from the evaluation that came back."""
    # A model's name of its own: the Volumes hold what other tests have trained as tiny.
    options = ["experiment=smoke", "model=tiny", "model.name=shown", "preprocess.source=prep"]
    for stage, *more in (["prep"], ["preprocess"], ["train", "loss=mixed", "max_steps=6"]):
        done = launch(stage, tmp_path, *options, *more)
        assert done.returncode == 0, done.stderr
    here = json.loads((tmp_path / "checkpoints/smoke_shown_mixed/run.json").read_text())
    away = [*options, "hydra/launcher=modal", "loss=mixed,baseline", "max_steps=2"]
    done = launch("train", tmp_path, *away, "sweep_name=away")
    assert done.returncode == 0, done.stderr
    assert "No intervals are known" not in done.stdout and "95 %" in done.stdout
    folder = tmp_path / "checkpoints/sweeps/away/train"
    runs = json.loads((folder / "sweep.json").read_text())["runs"]
    with (folder / "report.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    for run in runs:
        row, value = rows[run["name"]], run["value"]
        assert float(row["value"]) == pytest.approx(value, rel=1e-6)
        assert abs(value - here["evaluation"]["simulated_length"]) > 1e-4
        assert float(row["low"]) <= value <= float(row["high"]) and not row["not_known"]
        assert row["folder"] == str(folder / run["name"])


@pytest.mark.parametrize("models", ["qwen3_0_6b,qwen3_8b", "tiny,qwen3_8b"])
def test_one_sweep_two_machines(on_local_modal: LocalModal, tmp_path: Path, models: str) -> None:
    """A dry run shows both machines, and names what the first job lacks."""
    dry = ["hydra/launcher=modal", "hydra.launcher.dry_run=true"]
    done = launch("train", tmp_path, f"model={models}", *dry)
    assert done.returncode == 0
    assert "a launch would be refused" in done.stderr
    first = "H100 " if models.startswith("qwen") else "none"
    assert f"│ {first}" in done.stderr and "│ H100:8" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", sorted((REPOSITORY / "runs").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
