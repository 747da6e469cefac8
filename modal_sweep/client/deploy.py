"""The deployed app of a sweep: made once per version of the code, then only looked up."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modal_sweep.client import image
from modal_sweep.client.code import Shipment, digest_of
from modal_sweep.client.plan import Job
from modal_sweep.client.volumes import volume
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.names import MOUNT

if TYPE_CHECKING:
    import modal


def app_name(prefix: str, jobs: Sequence[Job]) -> str:
    """Holds the hash of everything the app consists of: its content never changes."""
    return f"{prefix}-{image.digest(sorted({job.function_name for job in jobs}))}"


def deploy(name: str, jobs: Sequence[Job], tags: dict[str, str]) -> bool:
    """Deploy the app unless it is there already; True when it was deployed now."""
    import modal

    functions = {job.function_name: job for job in jobs}
    try:
        for function in functions:
            modal.Function.from_name(name, function).hydrate()
        return False
    except modal.exception.NotFoundError:
        pass
    app = modal.App(name, tags=tags or None)
    with tempfile.TemporaryDirectory(prefix="modal-launcher-") as staging:
        codes = {job.code.digest: job.code for job in jobs}
        folders = {key: stage(code, Path(staging) / key) for key, code in codes.items()}
        for function, job in functions.items():
            add_function(app, function, job, folders[job.code.digest])
        app.deploy()
    return True


def stage(code: Shipment, folder: Path) -> Path:
    """Copy the files of a shipment below one folder, as they will lie below /root.

    Raises:
        LaunchError: they are not what the shipment's hash was made of any more.
    """
    staged = {remote: folder / Path(remote).relative_to("/root") for remote in code.files}
    try:
        for remote, local in code.files.items():
            staged[remote].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local, staged[remote])
        if digest_of(staged) == code.digest:
            return folder
    except FileNotFoundError:
        pass
    raise LaunchError("the code has changed since this command was started; start it again")


def add_function(app: "modal.App", name: str, job: Job, folder: Path) -> None:
    """One function: image, GPU list, reuse, start-up timeout; calls set the rest."""
    from modal_sweep.container.worker import run_job

    app.function(
        name=name,
        image=image.build(job.image, folder),
        gpu=job.function["gpu"],
        single_use_containers=job.function["single_use"],
        startup_timeout=job.function["startup_timeout"],
        timeout=86400,
        retries=at_once(10),
        include_source=False,
    )(run_job)


def at_once(attempts: int) -> "modal.Retries":
    """New attempts, without a pause."""
    import modal

    return modal.Retries(max_retries=attempts, initial_delay=0.0, backoff_coefficient=1.0)


def spawn_call(plan: dict[str, Any], reference: dict[str, Any], payload: bytes) -> str:
    """Spawn a job; returns the id of its call."""
    names = [plan["app"], plan["function"], plan["options"]]
    handle = variant(json.dumps([*names, reference["volume"], reference["sweep"]]))
    return str(handle.spawn(reference, payload).object_id)


@cache
def variant(names: str) -> "modal.Function[Any, Any, Any]":
    """The deployed function with a job's own options, looked up once.

    Args:
        names: as JSON: app, function, options, the Volume and the sweep's folder on it.
    """
    import modal

    app, function, options, outputs_volume, sweep = json.loads(names)
    volumes = {mount: volume(name) for mount, name in options["volumes"].items()}
    # A container sees, copies and commits the files of its own sweep only.
    outputs = volume(outputs_volume).with_mount_options(sub_path=sweep)
    secrets = [
        modal.Secret.from_name(name, required_keys=keys)
        for name, keys in options["secrets"].items()
    ]
    machine: dict[str, Any] = {
        name: options[name]
        for name in ("gpu", "cpu", "memory", "region", "cloud", "max_containers")
        if options[name] is not None
    }
    return modal.Function.from_name(app, function).with_options(
        **machine,
        timeout=options["timeout"],
        retries=at_once(options["retries"]),
        volumes={**volumes, MOUNT: outputs},
        secrets=secrets or None,
        env=options["env"] or None,
    )
