"""The plugin as Hydra finds it: in-tree, from a wheel, editable, beside its namesake, and cheap."""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
from dataclasses import fields
from pathlib import Path

import pytest

from modal_sweep.cli import parser
from modal_sweep.config import ImageSettings, JobSettings, ModalLauncherConf

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = sysconfig.get_path("purelib")
FIND = """
import json, sys
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
plugins = Plugins.instance().discover(Launcher)
places = {plugin.__module__: sys.modules[plugin.__module__].__file__ for plugin in plugins}
print(json.dumps([places, [name for name in ("modal", "torch", "rich") if name in sys.modules]]))
"""
FIELDS = """
import hydra
@hydra.main(version_base="1.3", config_path=None)
def main(cfg): pass
main()
"""


def python(code: str, *arguments: str, flags: tuple[str, ...] = (), path: str = "") -> str:
    """Run code in a folder where nothing of ours lies."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments],
        cwd="/", env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def where_found(flags: tuple[str, ...] = (), path: str = "") -> tuple[Path, list[str]]:
    places, heavy = json.loads(python(FIND, flags=flags, path=path))
    return Path(places["hydra_plugins.modal_launcher.launcher"]).resolve(), heavy


def test_found_in_tree() -> None:
    # -S leaves out the .pth file of the editable installation.
    place, heavy = where_found(flags=("-S",), path=f"{REPOSITORY}{os.pathsep}{PACKAGES}")
    assert place.is_relative_to(REPOSITORY)
    assert heavy == []


def test_found_from_an_editable_installation() -> None:
    place, _ = where_found()
    assert place == REPOSITORY / "hydra_plugins" / "modal_launcher" / "launcher.py"


@pytest.mark.slow
def test_found_from_a_wheel(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    install = [*pip, "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    place, heavy = where_found(flags=("-S",), path=f"{target}{os.pathsep}{PACKAGES}")
    assert place.is_relative_to(target)
    assert heavy == []
    entry = (target / "bin" / "modal-sweep").read_text()
    assert "modal_sweep.cli" in entry


@pytest.mark.parametrize("ours_first", [True, False])
def test_its_namesake_does_not_take_its_options(ours_first: bool, tmp_path: Path) -> None:
    """hydra-modal-launcher registers hydra/launcher=modal too, in whatever order."""
    pytest.importorskip("hydra_plugins.hydra_modal_launcher")
    folders = [str(REPOSITORY), PACKAGES]
    path = os.pathsep.join(folders if ours_first else reversed(folders))
    shown = ["hydra/launcher=modal", "hydra.launcher.if_done=rerun", "--cfg", "hydra"]
    shown += ["--package", "hydra.launcher"]
    (tmp_path / "app.py").write_text(FIELDS)
    run = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    printed = python(run, str(tmp_path / "app.py"), *shown, flags=("-S",), path=path)
    assert "_target_: hydra_plugins.modal_launcher.launcher.ModalLauncher" in printed


@pytest.mark.timing
def test_it_adds_little_to_the_start_of_any_hydra_app() -> None:
    """Under 20 ms: Hydra imports every plugin at every start."""
    code = """
import importlib, time
import hydra.plugins.launcher, hydra.plugins.search_path_plugin, hydra.core.config_store
start = time.process_time()
importlib.import_module("modal_sweep.config")
importlib.import_module("hydra_plugins.modal_launcher.launcher")
print(time.process_time() - start)
"""
    seconds = [float(python(code)) for _ in range(5)]
    assert statistics.median(seconds) < 0.02, seconds


def test_every_option_is_in_the_reference() -> None:
    text = (REPOSITORY / "docs" / "modal.md").read_text()
    for options in (ImageSettings, JobSettings, ModalLauncherConf):
        for field in fields(options):
            assert field.name == "_target_" or f"| `{field.name}` | " in text


def test_every_command_is_in_the_reference() -> None:
    text = (REPOSITORY / "docs" / "modal.md").read_text()
    help_text = parser().format_help()
    for line in help_text.splitlines():
        name = line.split()[0] if line.startswith("    ") and line.split() else ""
        assert not name.islower() or name in text


def test_what_runs_in_the_container_needs_nothing_of_the_client() -> None:
    code = """
import sys
import modal_sweep
assert "hydra" not in sys.modules
import modal_sweep.container.job, modal_sweep.container.zygote
assert "modal" not in sys.modules  # what a job's process starts with
import modal_sweep.container.worker
print([name for name in sys.modules if name.startswith(("modal_sweep.client", "rich"))])
"""
    assert python(code, path=str(REPOSITORY)).strip() == "[]"
