"""The deployed app of a sweep: made once per version of the code, then only looked up."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modal_sweep.client import code as _code
from modal_sweep.client import image
from modal_sweep.client.plan import Job, function_name
from modal_sweep.errors import LaunchError

if TYPE_CHECKING:
    import modal

MOUNT = "/mnt/hydra-sweeps"


def app_name(prefix: str, jobs: Sequence[Job]) -> str:
    """Holds the hash of everything the app consists of: its content never changes."""
    return f"{prefix}-{image.digest(sorted({function_name(job.function) for job in jobs}))}"


def deploy(name: str, jobs: Sequence[Job], tags: dict[str, str]) -> bool:
    """Deploy the app unless it is there already; True when it was deployed now."""
    import modal

    functions = {function_name(job.function): job for job in jobs}
    try:
        for function in functions:
            modal.Function.from_name(name, function).hydrate()
        return False
    except modal.exception.NotFoundError:
        pass
    app = modal.App(name, tags=tags or None)
    with tempfile.TemporaryDirectory(prefix="modal-launcher-") as staging:
        folders: dict[str, Path] = {}
        for function, job in functions.items():
            if job.code.digest not in folders:
                folders[job.code.digest] = stage(job.code, Path(staging) / job.code.digest)
            add_function(app, function, job, folders[job.code.digest])
        app.deploy()
    return True


def stage(code: _code.Shipment, folder: Path) -> Path:
    """Copy the files of a shipment below one folder, as they will lie below /root.

    Raises:
        LaunchError: they are not what the shipment's hash was made of any more.
    """
    staged = {remote: folder / Path(remote).relative_to("/root") for remote in code.files}
    try:
        for remote, local in code.files.items():
            staged[remote].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local, staged[remote])
        if _code.digest_of(staged) == code.digest:
            return folder
    except FileNotFoundError:
        pass
    raise LaunchError("the code has changed since this command was started; start it again")


def add_function(app: "modal.App", name: str, job: Job, folder: Path) -> None:
    """One function: image, GPU list, reuse, start-up timeout; calls set the rest."""
    import modal

    from modal_sweep.container.worker import run_job

    wanted = job.function
    app.function(
        name=name,
        image=image.build(job.image, folder),
        gpu=wanted["gpu"],
        single_use_containers=wanted["single_use"],
        startup_timeout=wanted["startup_timeout"],
        timeout=86400,
        retries=modal.Retries(max_retries=10, initial_delay=0.0, backoff_coefficient=1.0),
        include_source=False,
    )(run_job)


def volume(name: str) -> "modal.Volume":
    """A Volume by name, made as version 2 when it is missing."""
    import modal

    return modal.Volume.from_name(name, create_if_missing=True, version=2)


class Functions:
    """Handles for spawning: one per distinct set of options, looked up once."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def spawn(self, plan: dict[str, Any], reference: dict[str, Any], payload: bytes) -> str:
        """Spawn a job; returns the id of its call."""
        said = [plan["app"], plan["function"], plan["options"], reference["sweep"]]
        key = json.dumps(said, sort_keys=True)
        if key not in self.known:
            self.known[key] = variant(plan, reference)
        return str(self.known[key].spawn(reference, payload).object_id)


def variant(plan: dict[str, Any], reference: dict[str, Any]) -> "modal.Function[Any, Any, Any]":
    """The deployed function with a job's own options."""
    import modal

    said = plan["options"]
    volumes = {mount: volume(name) for mount, name in said["volumes"].items()}
    # A container sees, copies and commits the files of its own sweep only.
    outputs = volume(reference["volume"]).with_mount_options(sub_path=reference["sweep"])
    secrets = [
        modal.Secret.from_name(name, required_keys=keys) for name, keys in said["secrets"].items()
    ]
    options: dict[str, Any] = {
        name: said[name]
        for name in ("gpu", "cpu", "memory", "region", "cloud", "max_containers")
        if said[name] is not None
    }
    return modal.Function.from_name(plan["app"], plan["function"]).with_options(
        **options,
        timeout=said["timeout"],
        retries=modal.Retries(
            max_retries=said["retries"], initial_delay=0.0, backoff_coefficient=1.0
        ),
        volumes={**volumes, MOUNT: outputs},
        secrets=secrets or None,
        env=said["env"] or None,
    )
