"""The toy app driven in this process, and what its jobs told."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import warm
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from tests.study_app import toy

PROGRESS = "${hydra.sweep.dir}/${run_name}/progress.jsonl"
STUDY = [
    "hydra/sweeper=optuna_async",
    "hydra.sweeper.direction=maximize",
    "hydra.sweeper.name_key=run_name",
    f"hydra.sweeper.progress_file={PROGRESS}",
    "hydra.sweeper.progress_metric=eval/score",
    "+hydra.sweeper.record.x=${x}",
]


def composed(folder: Path, *overrides: str) -> tuple[HydraContext, DictConfig]:
    """What Hydra would hand to a sweeper of the toy app whose sweep lies in `folder`."""
    toy.register()
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("toy", create_config_search_path(None))
    config = hydra.compose_config(
        config_name="toy",
        overrides=[f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${run_name}", *overrides],
        run_mode=RunMode.MULTIRUN,
        with_log_configuration=False,
    )
    return HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks()), config


def launcher_for(
    folder: Path, *overrides: str, task: Callable[[DictConfig], Any] = toy.toy
) -> BasicLauncher:
    """A launcher of the toy app."""
    progress = f"+hydra.sweeper.progress_file={PROGRESS}"
    context, config = composed(folder, progress, *overrides)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=task, config=config
    )
    return cast(BasicLauncher, launcher)


def first(*points: str) -> str:
    """Points that are tried first, as an override."""
    return f"hydra.sweeper.warm_start={[*points]}"


def study(
    folder: Path,
    *overrides: str,
    task: Callable[[DictConfig], Any] = toy.toy,
    conditional: dict[str, Any] | None = None,
) -> list[JobReturn]:
    """One start of a study of the toy app."""
    context, config = composed(folder, *STUDY, *overrides)
    config.hydra.sweeper.conditional = conditional or {}
    sweeper = Plugins.instance().instantiate_sweeper(
        hydra_context=context, task_function=task, config=config
    )
    typed = OmegaConf.to_container(config.hydra.overrides.task)  # interpolations as they were
    returned: list[JobReturn] = sweeper.sweep(typed)
    return returned


def journal(folder: Path) -> list[list[str]]:
    """What the jobs told, a list of words a line."""
    path = folder / "journal"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], bool], process: "warm.Started | None" = None) -> None:
    """Wait until it is true; `process` must not end before."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
