"""The sweepers in somebody else's Hydra app, which lies outside the repository."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

APP = """
import sys

WITHOUT_STOCK = "stock=no" in sys.argv
if WITHOUT_STOCK:  # as where hydra-optuna-sweeper is not installed
    sys.argv.remove("stock=no")
    sys.modules["hydra_plugins.hydra_optuna_sweeper"] = None

import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path="settings", config_name="base")
def main(cfg):
    return cfg.x * cfg.y

main()
"""
SETTINGS = """
x: 1
y: 2
hydra: {sweep: {dir: sweep, subdir: "${hydra:job.num}"}}
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "base.yaml").write_text(SETTINGS)
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def run(app: Path, *arguments: str, code: int = 0) -> str:
    """What the app prints; it finds the installed packages and nothing of this repository."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "app.py", *arguments],
        cwd=app, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


AROUND = """
import contextlib

@contextlib.contextmanager
def around(script, jobs, folder, places):
    if places is None:
        raise ValueError("no places")
    print("open", script, [job.x for job in jobs], folder.name, places)
    yield
    print("closed")
"""


@pytest.mark.slow
def test_something_around_what_is_to_run(app: Path) -> None:
    """Not around what is done; its refusal leaves nothing."""
    (app / "own.py").write_text(AROUND)
    grid = ["-m", "hydra/sweeper=experiment", "hydra.sweeper.around=own.around", "x=1,2"]
    said = run(app, *grid, code=1)
    assert "no places" in said and not (app / "sweep").exists()
    said = run(app, *grid, "hydra.sweeper.n_jobs=2")
    assert said.startswith("open app [1, 2] sweep 2\n") and said.index("closed") < said.index(
        "rank"
    )
    assert "open app [3] sweep 1\n" in run(app, *grid[:-1], "x=1,3", "hydra.sweeper.n_jobs=1")
    assert "open" not in run(app, *grid[:-1], "x=1,3")


def test_a_grid(app: Path) -> None:
    grid = ["-m", "hydra/sweeper=experiment", "x=1,2", "y=3,4"]
    assert run(app, *grid, "hydra.sweeper.dry_run=true").endswith("\n4 runs\n")
    assert not (app / "sweep").exists()
    assert "completed" in run(app, *grid)
    assert (app / "sweep" / "sweep.json").exists()


@pytest.mark.parametrize(
    "stock",
    [pytest.param([], marks=pytest.mark.slow, id="beside the stock sweeper"),
     pytest.param(["stock=no"], id="alone")],
)  # fmt: skip
def test_a_study(app: Path, stock: list[str]) -> None:
    """Each sampler and pruner is offered with and without hydra-optuna-sweeper."""
    study = ["-m", "hydra/sweeper=optuna_async", "x=range(1,9)", "hydra.sweeper.n_trials=3", *stock]
    text = run(app, *study, "hydra.sweeper.dry_run=true", "hydra.sweeper.sampler.seed=1")
    assert "sampler: TPESampler, pruner: NopPruner" in text and text.endswith("\n3 runs\n")
    assert not (app / "sweep").exists()
    chosen = ["hydra/sweeper/sampler=grid", "hydra/sweeper/pruner=median"]
    text = run(app, "hydra/sweeper=optuna_async", *chosen, *stock, "--cfg", "hydra")
    assert "_target_: optuna.samplers.GridSampler" in text and "MedianPruner" in text
    text = run(app, *study, "hydra/sweeper/sampler=nowhere", code=1)
    assert all(f"\n\t{name}\n" in text for name in ("cmaes", "grid", "nsgaii", "random", "tpe"))


def test_the_stock_sweeper_composes_beside_ours(app: Path) -> None:
    text = run(app, "hydra/sweeper=optuna", "hydra/sweeper/sampler=nsgaii", "--cfg", "hydra")
    assert "optuna.samplers.NSGAIISampler" in text and "optuna_sweeper.OptunaSweeper" in text


# A seed, as two trials of one value would be one run.
SEARCH = """# @package _global_
defaults: [{override /hydra/sweeper: optuna_async}]
hydra:
  mode: MULTIRUN
  sweeper: {n_trials: 2, n_jobs: 1, sampler: {seed: 1}, params: {x: "range(1,99)"}}
"""


@pytest.fixture
def searching(app: Path) -> Path:
    """The app with a file that asks for a search."""
    (app / "settings" / "search").mkdir()
    (app / "settings" / "search" / "mine.yaml").write_text(SEARCH)
    return app


@pytest.mark.slow
def test_the_command_of_a_row_runs_once_where_a_file_asks_for_a_search(searching: Path) -> None:
    app = searching
    run(app, "+search=mine")
    [row, _] = json.loads((app / "sweep" / "sweep.json").read_text())["runs"]
    python, script, *words = shlex.split(row["command"])
    assert (python, script, words[-1]) == ("python", "app.py", "hydra.mode=RUN")
    run(app, *words, "hydra.run.dir=alone")
    assert (app / "alone" / ".hydra").exists()


@pytest.mark.slow
def test_so_it_does_with_m(searching: Path) -> None:
    app = searching
    of_batches = ["-m", "+search=mine", "hydra/launcher=submitit_local", "hydra.sweep.dir=batches"]
    run(app, *of_batches)
    [row, _] = json.loads((app / "batches" / "sweep.json").read_text())["runs"]
    assert row["command"].endswith("hydra.sweep.dir=batches hydra.sweeper.n_trials=1")
