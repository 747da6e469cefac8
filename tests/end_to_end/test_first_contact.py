"""The three lines of the card, typed without account, GPU and network: each ends in one message,
and every line of it works when it is typed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import REPOSITORY

LINES = {
    "sweep": "python train.py -m loss=full-opd lr=3e-5,5e-5",
    "regen": "python regen.py model=qwen3_8b",
    "study": "python train.py -m hparams_search=opd",
}
SMALL = [
    "data.name=first", "epochs=1", "max_steps=2", "regen.max_tokens=8",
    "data.train=[{path: 'synthetic:train', limit: 12}]",
    "data.eval=[{path: 'synthetic:eval', limit: 4}]",
]  # fmt: skip
"""Options that the lines and all that they name carry along, for the sake of time."""


PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m tests.modal_local" ]; then
    shift 2
    set -- -m tests.modal_local --env OMP_NUM_THREADS=1 --option forks={forks} \\
        --option torch_forks={torch_forks} "$@"
fi
exec {python} "$@"
"""
"""A shell's python: train.py and regen.py are forks, as are the containers of a local Modal."""


class Newcomer:
    """A shell in the checkout, whose artifacts go to an empty folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        program = home / "bin" / "python"
        program.parent.mkdir()
        # prep and prefetch ask the hub of their environment, which is read when it is imported.
        python = warm.python("train.py", "regen.py")
        forks, torch_forks = warm.server("containers"), warm.server("torch-containers")
        text = PYTHON.format(python=python, forks=forks, torch_forks=torch_forks)
        program.write_text(text)
        program.chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MODAL_", "HF_"))}
        self.environment = {
            **clean, "MODAL_CONFIG_PATH": str(home / "no.toml"), "HOME": str(home),
            "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1",
            "SPECFORGE_DATASETS": str(home / "artifacts/datasets"),
            "SPECFORGE_CHECKPOINTS": str(home / "artifacts/checkpoints"),
            "PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        self.typed: dict[str, subprocess.CompletedProcess[str]] = {}

    def types(self, line: str) -> subprocess.CompletedProcess[str]:
        """What a line says; one that was typed before is not typed again."""
        if line not in self.typed:
            self.typed[line] = subprocess.run(
                ["bash", "-c", line], cwd=REPOSITORY, env=self.environment, text=True,
                capture_output=True, check=False,
            )  # fmt: skip
            for noise in ("Error executing job", "HYDRA_FULL_ERROR", "Traceback"):
                assert noise not in self.typed[line].stderr, line
        return self.typed[line]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    return Newcomer(tmp_path_factory.mktemp("newcomer"))


def suggested(message: str) -> list[str]:
    """The commands of a message, as they stand there."""
    return [m.strip() for m in re.findall(r"^  (python .*?)(?:  # .*)?$", message, re.M)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_every_line_of_the_message_works(newcomer: Newcomer, name: str) -> None:
    few = {"study": ["hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1"]}.get(name, [])
    refused = newcomer.types(shlex.join([*shlex.split(LINES[name]), *SMALL, *few]))
    assert refused.returncode == 1 and "`modal setup` logs in" in refused.stderr
    if name != "regen":
        assert "does not exist" not in refused.stderr
    lines = suggested(refused.stderr)
    assert any("dry_run=true" in line for line in lines)
    assert any(line.startswith("python -m tests.modal_local -- ") for line in lines)
    for line in lines:
        done = newcomer.types(line)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    last = newcomer.types(lines[-1])
    ends = {
        "sweep": "2 of 2 jobs completed",
        "study": "] completed after",
        "regen": "input 16 = done 16",
    }
    assert ends[name] in last.stdout + last.stderr, last.stdout + last.stderr


@pytest.mark.parametrize("line", [
    *LINES.values(), "python train.py", "python prep.py",
    "python prep.py data=ultrachat prep.check=true",
    f"{LINES['sweep']} hydra.launcher.dry_run=true", f"{LINES['regen']} regen.dry_run=true",
])  # fmt: skip
@pytest.mark.slow
def test_what_is_refused_or_checked_leaves_no_folder(line: str, tmp_path: Path) -> None:
    said = Newcomer(tmp_path).types(line)
    assert said.returncode == (0 if "dry_run" in line else 1), said.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.name == "artifacts"] == []


def test_offline_says_offline(tmp_path: Path) -> None:
    said = Newcomer(tmp_path).types("python prefetch.py model=smollm2_135m")
    assert said.returncode == 1
    assert "error: offline: http://127.0.0.1:9 cannot be reached, and HuggingFaceTB/" in said.stderr
