"""Code of one's own: which files it is made of, and what becomes of a run when they are edited."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_train import run

from specforge_exp.config import Config
from specforge_exp.config.own_code import own_files
from specforge_exp.errors import InputError
from specforge_exp.stages.train import train

__all__ = ["run"]


def test_what_code_of_ones_own_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a module imports from beside it, however it says so; read, not imported."""
    files = {
        "lab/__init__.py": "",
        "lab/losses.py": "import torch\nfrom . import terms\nfrom .deep.more import f\nimport own",
        "lab/terms.py": "from specforge_exp.losses import opd\nfrom ..lab import later\n",
        "lab/later.py": "def f():\n    import lab.losses, json\n    import broken\n",
        "lab/deep/__init__.py": "from ..wide import *",
        "lab/deep/more.py": "from . import sibling, nothing",
        "lab/deep/sibling.py": "",
        "lab/wide.py": "",
        "lab/unused.py": "",
        "own.py": "",
        "broken.py": "import own(",
        "specforge_exp/losses.py": "",
    }
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = own_files("lab.losses.mine")
    left_out = {"lab/unused.py", "specforge_exp/losses.py"}
    assert found == sorted(tmp_path / name for name in {*files} - left_out)
    assert not {"lab", "own", "broken"} & {*sys.modules}
    assert own_files("own.mine") == [tmp_path / "own.py"]
    assert own_files("lab.nothing.mine") == [tmp_path / "lab" / "__init__.py"]
    for target in ("specforge_exp.losses.opd", "sys.nothing", "nowhere.at.all", ""):
        assert own_files(target) == []


def test_of_an_installed_package_its_own_files_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages"
    (folder / "kit").mkdir(parents=True)
    (folder / "kit" / "__init__.py").write_text("import other")
    (folder / "kit" / "losses.py").touch()
    (folder / "other.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    assert own_files("kit.losses.mine") == [folder / "kit/__init__.py", folder / "kit/losses.py"]


def test_another_loss_of_ones_own_is_another_run(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever edits a loss and trains again does not want the numbers of the old one."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lab_loss.py").write_text("from lab_terms import mine\n")
    (tmp_path / "lab_terms.py").write_text("from specforge_exp.losses import opd as mine\n")
    run.loss, run.max_steps = replace(run.loss, _target_="lab_loss.mine"), 1
    first = train(run)
    assert train(run) == first
    (tmp_path / "lab_terms.py").write_text("from specforge_exp.losses import opd as mine  # new\n")
    assert train(run) == first  # this process has imported what it was then
    process = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: -process)
    with pytest.raises(InputError, match=r"the code of lab_loss\.mine has changed.*resume=false"):
        train(run)
    for name in ("lab_loss", "lab_terms"):
        del sys.modules[name]
