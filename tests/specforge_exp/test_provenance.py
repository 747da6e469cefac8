"""What made a number: which code, which packages."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_train import run

from specforge_exp import paths, provenance
from specforge_exp.config import Config
from specforge_exp.provenance import code, code_at_first, cores, git_commit, machine
from specforge_exp.stages.train import train

__all__ = ["run"]


def test_a_changed_tree_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    (tmp_path / "code").write_text("before")
    owner = ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "one"]
    for words in (["init", "-q"], ["add", "code"], owner):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    commit = git_commit()
    assert commit is not None and len(commit) == 40
    (tmp_path / "code").write_text("after")
    assert git_commit() == f"{commit}-dirty"


def test_code_is_that_which_a_process_began_with(
    tmp_path: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "specforge_exp"
    (package / "room").mkdir(parents=True)
    one, other = package / "losses.py", package / "room" / "rows.py"
    one.write_text("a = 1")
    other.write_text("a = 1")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    own = code_at_first(1)
    assert own == code_at_first(2)
    one.write_text("a = 2")
    assert code_at_first(1) == own != code_at_first(3)  # a fork that imports it now
    one.write_text("a = 1")
    assert code_at_first(4) == own
    other.rename(package / "room" / "others.py")
    assert code_at_first(5) != own


def test_a_loss_of_ones_own_is_part_of_the_code(
    tmp_path: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "my_losses.py"
    cfg = replace(cfg, loss=replace(cfg.loss, _target_="my_losses.mine"))
    seen = [code(cfg)]
    for number, text in enumerate(["a = 1", "a = 2", "a = 1"]):
        file.write_text(text)
        monkeypatch.setattr(os, "getpid", lambda number=number: -1 - number)
        seen.append(code(cfg))
    assert len(set(seen)) == 3 and seen[1] == seen[3]
    assert "my_losses" not in sys.modules
    for target in ("sys.nothing", "nowhere.at.all"):
        assert code(replace(cfg, loss=replace(cfg.loss, _target_=target))) == seen[0]


def test_the_machine_is_its_gpus_or_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not loaded torch computes on none; so does device=cpu."""
    names = "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", "NVIDIA L4"
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 3, get_device_name=lambda n: names[n]
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert machine("auto") == "2 x NVIDIA H100 80GB HBM3, 1 x NVIDIA L4"
    here = machine("cpu")
    assert here.startswith(f"{cores()} cores of ") and here.partition(" of ")[2]
    cuda.is_available = lambda: False
    assert machine("auto") == here
    monkeypatch.delitem(sys.modules, "torch")
    assert machine("auto") == here


def test_steps_of_other_code_or_packages_are_told(
    run: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.max_steps = 4
    train(run)
    folder = paths.run_dir(run)
    [first] = json.loads((folder / "run.json").read_text())["makers"]
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "step-000004")
    monkeypatch.setattr(provenance, "COMPUTE", ["torch"])
    train(run)
    makers = json.loads((folder / "run.json").read_text())["makers"]
    assert makers[0] == first != makers[1] and first.startswith(makers[1])
    [told] = [r.getMessage() for r in caplog.records if "steps up to here" in r.getMessage()]
    assert all(maker in told for maker in makers)
    caplog.clear()
    caplog.set_level("INFO")
    train(run)
    assert "it was made by" not in caplog.text
    monkeypatch.setattr(provenance, "COMPUTE", ["numpy"])
    train(run)
    assert f"train: it was made by {' and '.join(makers)}; this is code" in caplog.text
