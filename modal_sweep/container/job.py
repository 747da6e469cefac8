"""The job itself, in its own process in the container: Hydra's `run_job`, then a JSON file."""

import gc
import json
import logging
import os
import traceback
from typing import Any

from modal_sweep.container.request import Request
from modal_sweep.errors import JobFailed
from modal_sweep.protocol import payload, result
from modal_sweep.protocol.names import versions
from modal_sweep.protocol.records import write_whole

ELSEWHERE = (
    "the container has no module of this name: image.sources names packages of yours that are sent "
    "(a script's own folder is, with python -m its whole package), image.packages what is installed"
)


def preload() -> None:
    """Import what every job needs, before the fork."""
    import hydra.core.utils
    import omegaconf
    from hydra.core.plugins import Plugins

    Plugins.instance()
    versions()
    # Fills the caches of the parser of interpolations.
    warm = omegaconf.OmegaConf.create({"x": 1, "y": "a${x}/${.x}", "z": "${oc.select:x}"})
    assert hydra.core.utils and warm.y and warm.z
    # What is here now is never collected in a job, so its memory stays shared.
    gc.freeze()


def run(request: Request) -> None:
    """Run a job and write its result, in a folder that does not outlive the container."""
    envelope = outcome(request)
    write_whole(request.result, [json.dumps(envelope).encode()], durable=False)


def outcome(request: Request) -> dict[str, Any]:
    """How a job has ended."""
    reference = request.reference
    if problem := mismatch(reference["versions"]):
        return result.failed("VersionError", problem)
    os.makedirs(reference["cwd"], exist_ok=True)
    os.chdir(reference["cwd"])
    try:
        context, task_function = payload.unpack(request.common)
        config = payload.unpack_config(request.config)
    except ImportError as error:
        return result.failed(type(error).__name__, f"{error}; {ELSEWHERE}")
    payload.freeze_environment(reference.get("environ", {}))
    try:
        return run_hydra_job(context, task_function, config)
    except SystemExit as left:
        if left.code in (None, 0):
            return {"status": "completed", "value": result.pack_value(None)}
        message = f"left the interpreter with exit code {left.code}"
        return result.failed(type(left).__name__, message)


def mismatch(launched_with: dict[str, str]) -> str | None:
    """What differs between the launching Python and this one; None when they agree."""
    here = versions()
    wrong = [f"{name} {here.get(name)}" for name, v in launched_with.items() if here.get(name) != v]
    if not wrong:
        return None
    launched = ", ".join(f"{name} {number}" for name, number in launched_with.items())
    return f"the image has {', '.join(wrong)}, but the job was launched with {launched}"


def run_hydra_job(context: Any, task_function: Any, config: Any) -> dict[str, Any]:
    """As Hydra's launchers do in their workers."""
    from hydra.core.utils import JobStatus, run_job
    from hydra.errors import CompactHydraException

    returned = run_job(
        hydra_context=context,
        task_function=task_function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    place = {
        "working_dir": returned.working_dir,
        "task_name": returned.task_name,
        "output_dir": config.hydra.runtime.output_dir,
    }
    error = returned._return_value
    if returned.status == JobStatus.COMPLETED:
        try:
            return {"status": "completed", "value": result.pack_value(error), **place}
        except JobFailed as unsent:
            error = unsent
    # Hydra 1.3 keeps a job's traceback out of its log; a compact error is meant to have none.
    compact = isinstance(error, CompactHydraException)
    lines = [str(error)] if compact else traceback.format_exception(error)
    logging.getLogger(returned.task_name).error("".join(lines).rstrip())
    return {**result.failed(type(error).__name__, str(error)), **place}
