"""The wheel alone, in an environment that does not know the checkout, from an empty folder."""

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.slow
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
SMALL = [
    "experiment=quickstart", "preprocess.source=prep", "max_steps=2", "epochs=1", "threads=1",
    "data.train=[{path: 'synthetic:train', limit: 12}]",
    "data.eval=[{path: 'synthetic:eval', limit: 4}]",
]  # fmt: skip
APP = """
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    return 1.0

main()
"""


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with our wheel and, by a .pth, this one's dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    wheels = folder / "wheels"
    build = [*PIP, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    [packages] = (folder / "env" / "lib").glob("python*/site-packages")
    install = [*PIP, "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, *map(str, wheels.glob("*.whl"))], check=True, capture_output=True)
    # A folder on the path by a .pth: its own .pth, of an editable installation, is not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python.parent


def run(folder: Path, *words: str) -> str:
    """What a command prints in an empty folder, without our tree on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        words, cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_help_from_an_empty_folder(binaries: Path, tmp_path: Path) -> None:
    code = "import specforge_exp.config as c; print(c.__file__, c.REPOSITORY)"
    assert str(REPOSITORY) not in run(tmp_path, str(binaries / "python"), "-c", code)
    assert "bench: default, standard, zlab" in run(
        tmp_path, f"{binaries}/specforge", "bench", "--help"
    )
    assert list(tmp_path.iterdir()) == []


def test_two_steps_of_the_tiny_target(binaries: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "model" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("defaults: [tiny]\nname: mine\n")
    for stage in ("prep", "preprocess", "train"):
        run(tmp_path, f"{binaries}/specforge", stage, "--config-dir", "mine", *SMALL, "model=mine")
    [record] = (tmp_path / "artifacts" / "checkpoints").glob("*/run.json")
    assert (tmp_path / "artifacts" / "datasets" / "quickstart--mine.tokens").is_dir()
    assert list(record.parent.glob("step-*"))
    assert (record.parent / ".hydra" / "train" / "config.yaml").exists()


def test_a_sweep_and_its_processes(binaries: Path, tmp_path: Path) -> None:
    command = [f"{binaries}/specforge", "prep", *SMALL]
    planned = run(tmp_path, *command, "-m", "seed=0,1", "hydra.sweeper.dry_run=true")
    assert planned.splitlines()[-1] == "2 runs"
    run(tmp_path, *command, "-m", "data.name=a,b", "hydra.sweeper.n_jobs=2")
    made = (tmp_path / "artifacts" / "datasets").glob("*/train.jsonl")
    assert {path.parent.name for path in made} == {"a", "b"}


def test_modal_gets_the_installed_package(binaries: Path, tmp_path: Path) -> None:
    command = [f"{binaries}/specforge", "train", "-m", "hydra/launcher=modal", "model=qwen3_8b"]
    printed = run(tmp_path, *command, "hydra.launcher.dry_run=true")
    assert "H100:8" in printed and "torch>=" in printed
    ships = next(line for line in printed.splitlines() if line.startswith("ships "))
    assert int(ships.split()[1]) > 150


def test_the_plugins_serve_another_app(binaries: Path, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    command = [str(binaries / "python"), "app.py", "-m", "+x=1,2"]
    sweep = [*command, "hydra/sweeper=experiment", "hydra.sweeper.dry_run=true"]
    assert run(tmp_path, *sweep).splitlines()[-1] == "2 runs"
    launch = [*command, "hydra/launcher=modal", "hydra.launcher.dry_run=true"]
    assert "dry run: nothing was spawned" in run(tmp_path, *launch)
