"""A session of the launcher as a sweeper drives it, also from a process that can be killed.

python session_driver.py SWEEP_DIR JOBS [OVERRIDES]: `JOBS` is a JSON list of lists of overrides;
prints a line of JSON for every end and for every report.
"""

import json
import sys
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
import trial

from modal_sweep.client.session import Session

APP = Path(__file__).resolve().parent


def open_session(sweep: Path, *overrides: str, total: int = 1) -> Session:
    """What a sweeper gets from the launcher that Hydra has made for it."""
    flags = ["hydra/launcher=modal", f"hydra.sweep.dir={sweep}", "hydra.launcher.poll=0.2"]
    flags += ["hydra.launcher.image.sources=[trial.py,standing.py]", "hydra.job.name=trial"]
    flags += ["hydra.sweep.subdir=${name}"]
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("trial", create_config_search_path(str(APP / "conf")))
    config = hydra.compose_config("trial", [*flags, *overrides], run_mode=RunMode.MULTIRUN)
    launcher: Any = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(hydra.config_loader, Callbacks(config)),
        task_function=trial.main,
        config=config,
    )
    session: Session = launcher.session(total=total)
    return session


def job(name: str, **values: object) -> list[str]:
    """Overrides of a job."""
    return [f"name={name}", *(f"{key}={value}" for key, value in values.items())]


def outcome(returned: JobReturn) -> str:
    """A job's value, or why it has none, as text."""
    completed = returned.status == JobStatus.COMPLETED
    return repr(returned.return_value if completed else returned._return_value)


def main() -> None:
    sweep, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    session = open_session(sweep, *sys.argv[3:], total=len(jobs))
    for number, overrides in enumerate(jobs):
        session.start(number, overrides)
    left = len(jobs)
    while left:
        for number, returned in session.ended(1.0):
            print(json.dumps({"end": number, "said": outcome(returned)}), flush=True)
            left -= 1
        for number, lines in session.reports().items():
            print(json.dumps({"reports": number, "lines": lines}), flush=True)
    session.close()


if __name__ == "__main__":
    main()
