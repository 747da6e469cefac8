"""Sweeps of the app in processes of their own, and what they left."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import warm
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.types import HydraContext, RunMode

REPOSITORY = Path(__file__).resolve().parents[2]
APP = REPOSITORY / "tests" / "sweep_app"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{APP}"}
SCRIPT = str(APP / "app.py")


def start(
    folder: Path, *overrides: str, environment: Mapping[str, str] | None = None
) -> warm.Started:
    """A sweep in `folder`, which is running."""
    command = [SCRIPT, "-m", f"folder={folder}", *overrides]
    return warm.start(command, cwd=folder, env={**ENVIRONMENT, **(environment or {})})


def sweep(
    folder: Path, *overrides: str, code: int = 0, environment: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """Run a sweep to its end; returns what it printed and its errors."""
    process = start(folder, *overrides, environment=environment)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == code, printed + errors
    return printed, errors


def refused(folder: Path, *overrides: str) -> str:
    """What a sweep that is refused says, in this process: Hydra ends with what such an error says.

    Without the launchers of the app.
    """
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("app", create_config_search_path(f"file://{APP / 'conf'}"))
    try:
        with pytest.raises(CompactHydraException) as caught:
            config = hydra.compose_config(
                config_name="config",
                overrides=[f"folder={folder}", *overrides],
                run_mode=RunMode.MULTIRUN,
                with_log_configuration=False,
            )
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
            sweeper = Plugins.instance().instantiate_sweeper(
                hydra_context=context,
                task_function=None,
                config=config,  # type: ignore[arg-type]
            )
            sweeper.sweep(list(config.hydra.overrides.task))
    finally:
        GlobalHydra.instance().clear()
    return str(caught.value)


def content(folder: Path) -> dict[str, Any]:
    """sweep.json."""
    read: dict[str, Any] = json.loads((folder / "sweep" / "sweep.json").read_text())
    return read


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Its runs by name."""
    return {run["name"]: run for run in content(folder)["runs"]}


def started(folder: Path) -> list[str]:
    """The jobs that were started, in order."""
    file = folder / "starts.txt"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(what: Callable[[], bool], process: warm.Started) -> None:
    """Until something is so; fails when the process ends before."""
    deadline = time.monotonic() + 300
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
