"""Both ends of Optuna, and the stock sweeper with SQLite in an environment of its own.

Optuna 2.10 is in this environment already; the others are installed from PyPI once and stay in
artifacts/: those tests are marked `live`.
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / "artifacts" / "sweeper_venvs"
PACKAGES = {
    "newest": ["hydra-core==1.3.8", "optuna==5.0.0", "cmaes"],
    "stock": ["hydra-core==1.3.8", "hydra-optuna-sweeper==1.3.0", "sqlalchemy<2"],
    "mixed": ["hydra-core==1.3.8", "hydra-optuna-sweeper==1.3.0", "sqlalchemy>=2"],
}
SCRIPT = str(ROOT / "tests/study_app/toy.py")

NETWORK = pytest.mark.live
"""Installs from PyPI, once."""
pytestmark = pytest.mark.slow


def python_of(name: str) -> str:
    """An environment with some packages and nothing of ours."""
    folder = VENVS / name
    python, ready = folder / "bin" / "python", folder / "ready"
    packages = " ".join(PACKAGES[name])
    VENVS.mkdir(parents=True, exist_ok=True)
    with (VENVS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be making it
        if not ready.exists() or ready.read_text() != packages:
            venv = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)]
            subprocess.run(venv, check=True)
            pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet"]
            install = ["install", "--no-compile", "--disable-pip-version-check"]
            subprocess.run([*pip, *install, *PACKAGES[name]], check=True)
            ready.write_text(packages)
    return str(python)


def run(python: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, SCRIPT, "-m", "hydra.sweep.subdir=${run_name}", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def study(python: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(
        python,
        f"hydra.sweep.dir={folder}",
        "hydra/sweeper=optuna_async",
        "hydra.sweeper.name_key=run_name",
        "hydra.sweeper.progress_file=${hydra.sweep.dir}/${run_name}/progress.jsonl",
        "hydra.sweeper.progress_metric=eval/score",
        *options,
    )


@pytest.mark.parametrize("name", ["oldest", pytest.param("newest", marks=NETWORK)])
def test_both_ends_of_optuna(name: str, tmp_path: Path) -> None:
    python = sys.executable if name == "oldest" else python_of(name)
    version = "import optuna; print(optuna.__version__)"
    printed = subprocess.check_output([python, "-c", version], text=True)
    assert printed.startswith("2.10" if name == "oldest" else "5.")
    (tmp_path / "go").touch()
    options = [
        "x=interval(0.0,6.0)", "kind=a,b", "steps=2", "act=value,nans,raise",
        "hydra.sweeper.n_jobs=3", "hydra/sweeper/pruner=median", "hydra.sweeper.direction=maximize",
        "hydra.sweeper.warm_start=['x=3 act=nans','x=3 act=value','x=3 act=raise']",
    ]  # fmt: skip
    first = study(python, tmp_path, *options, "hydra.sweeper.n_trials=4")
    assert first.returncode == 0, first.stderr
    assert "alembic" not in first.stdout + first.stderr and "Warning" not in first.stderr
    begin = f"""
import optuna
storage = "sqlite:///{tmp_path}/study.db"
study = optuna.load_study(study_name="{"/".join(tmp_path.parts[-2:])}", storage=storage)
trial = study.ask()
trial.suggest_float("x", 0.0, 6.0)
"""
    subprocess.run([python, "-c", begin], check=True)  # killed there
    second = study(python, tmp_path, *options, "hydra.sweeper.n_trials=7")
    assert second.returncode == 0, second.stderr
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [run["number"] for run in runs] == list(range(7))
    assert [run["status"] for run in runs[:3]] == ["failed", "completed", "failed"]
    assert {run["status"] for run in runs[3:]} <= {"completed", "failed", "pruned"}


@NETWORK
@pytest.mark.parametrize("sampler", ["random", "cmaes", "nsgaii", "grid"])
def test_samplers_of_the_newest_optuna(sampler: str, tmp_path: Path) -> None:
    space = "x=range(0,4)" if sampler == "grid" else "x=interval(0.0,6.0)"
    chosen = f"hydra/sweeper/sampler={sampler}"
    done = study(python_of("newest"), tmp_path, space, chosen, "hydra.sweeper.n_trials=3")
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["completed"] * 3


@NETWORK
def test_the_stock_sweeper_runs_with_sqlite(tmp_path: Path) -> None:
    python = python_of("stock")
    done = run(
        python,
        f"hydra.sweep.dir={tmp_path}",
        "hydra/sweeper=optuna",
        f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db",
        "hydra.sweeper.study_name=stock",
        "hydra.sweeper.n_trials=8",
        "hydra.sweeper.direction=maximize",
        "x=interval(0.0,6.0)",
        "kind=choice(a,b)",
    )
    assert done.returncode == 0, done.stderr
    ask = f"""
import optuna
study = optuna.load_study(study_name="stock", storage="sqlite:///{tmp_path}/study.db")
print([trial.state.name for trial in study.trials].count("COMPLETE"), study.best_value)
"""
    count, best = subprocess.check_output([python, "-c", ask], text=True).split()
    assert count == "8"
    assert f"best_value: {best}" in (tmp_path / "optimization_results.yaml").read_text()


@NETWORK
def test_packages_that_do_not_fit_are_named(tmp_path: Path) -> None:
    done = study(python_of("mixed"), tmp_path, "x=interval(0.0,6.0)")
    assert done.returncode == 1
    assert "opens no storage with SQLAlchemy 2" in done.stderr and "pip install" in done.stderr
    assert "Traceback" not in done.stderr and "AssertionError" not in done.stderr
