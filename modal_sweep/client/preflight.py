"""Checks before the first spawn, on the launching machine; nothing here costs money."""

import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modal_sweep.client import cost
from modal_sweep.client.environ import SECRET_NAME
from modal_sweep.client.plan import Job
from modal_sweep.client.settings import imported, volume_name, without_hydra
from modal_sweep.client.volumes import exists, read_if_there, volume
from modal_sweep.config import ModalLauncherConf
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.journal import Journal

MOST_NAME = 255
MOST_UPLOADED = 2_000_000_000
CHOICES = {"workspace": "MODAL_PROFILE", "environment": "MODAL_ENVIRONMENT"}
"""What leads to another place on Modal."""
Records = dict[str, bytes | None]
"""What small files on Volumes hold, as far as they were read; None: there is none."""


def here() -> dict[str, str]:
    """The workspace and the environment that this process uses."""
    from modal import Environment, Workspace

    names = Workspace.from_context().hydrate().name, Environment.from_context().hydrate().name
    return {"workspace": names[0] or "", "environment": names[1] or ""}


def refuse_elsewhere(journal: Journal, conf: ModalLauncherConf | None = None) -> dict[str, str]:
    """Where this process is, and what a launch says of its app and Volume.

    A sweep lives in one workspace, environment, app and Volume, written down and kept: calls know
    none of them, but Volumes and Dicts do, so from another place its files look lost.

    Raises:
        LaunchError: the sweep lives elsewhere. A journal of old does not say where.
    """
    place = here() | ({"app": conf.app, "volume": volume_name(conf)} if conf else {})
    for kind, name in place.items():
        noted = journal.sweep.get(kind, name)
        if noted != name:
            choice = CHOICES.get(kind, f"hydra.launcher.{kind}")
            raise LaunchError(
                f"{journal.sweep_dir} is a sweep of {kind} {noted}, and this is {kind} {name}; "
                f"{choice}={noted} leads back to it, another hydra.sweep.dir to a sweep of its own"
            )
    return place


def check_jobs(jobs: Sequence[Job]) -> None:
    """What can be said without Modal: every job validates, no two write the same place."""
    for job in jobs:
        validate(job)
        refuse_env_copy(job)
        refuse_long_names(job)
    refuse_same_places(jobs)


def refuse_long_names(job: Job) -> None:
    """A folder that no file system takes is found out here, not in a container that is paid for."""
    for name in Path(job.output_dir).parts:
        if (size := len(os.fsencode(name))) > MOST_NAME:
            raise LaunchError(
                f"job {job.number} would write to a folder whose name has {size} bytes, and file "
                f"systems take {MOST_NAME}: {name[:60]}...; give it a shorter one: "
                "hydra.sweep.subdir='${hydra.job.num}'"
            )


def refuse_same_places(jobs: Sequence[Job]) -> None:
    """Jobs that run at the same time write to places of their own."""
    writer: dict[str, Job] = {}
    for job in jobs:
        for place in [job.output_dir, *job.settings.unique]:
            other = writer.setdefault(place, job)
            if other is not job:
                raise LaunchError(
                    f"{other.label} and {job.label} would both write {place}; "
                    "give them different names"
                )


def validate(job: Job) -> None:
    """Run the application's own check of its configuration on a job's."""
    dotted = job.settings.validate
    if dotted is None:
        return
    check = imported("validate", dotted)
    try:
        check(without_hydra(job.config))
    except Exception as error:
        raise LaunchError(f"{job.label}: {error}") from None


def refuse_env_copy(job: Job) -> None:
    """hydra.job.env_copy writes its values into hydra.yaml: no place for a secret."""
    for name in job.config.hydra.job.env_copy or []:
        if SECRET_NAME.search(name):
            raise LaunchError(
                f"hydra.job.env_copy={name} would write its value into .hydra/hydra.yaml; give it "
                f"as a secret: `modal secret create one {name}=...`, "
                f"resources.secrets={{one: [{name}]}}"
            )


def missing_secrets(required: dict[str, set[str]]) -> list[str]:
    """The command that makes each secret that is missing or lacks a key."""
    import modal

    commands = []
    for name, keys in sorted(required.items()):
        try:
            modal.Secret.from_name(name, required_keys=sorted(keys)).hydrate()
        except modal.exception.NotFoundError:
            values = " ".join(f"{key}=..." for key in sorted(keys)) or "KEY=VALUE"
            commands.append(f"modal secret create {name} {values}")
    return commands


def required_secrets(jobs: Iterable[Job]) -> dict[str, set[str]]:
    """Names and keys of the secrets of all jobs."""
    required: dict[str, set[str]] = defaultdict(set)
    for job in jobs:
        for name, keys in job.settings.secrets.items():
            required[name].update(keys)
    return required


def volume_names(jobs: Iterable[Job], outputs: str) -> list[str]:
    """Names of the Volumes of all jobs."""
    return sorted({outputs} | {name for job in jobs for name in job.settings.volumes.values()})


def inputs(jobs: Sequence[Job]) -> tuple[list[str], list[dict[str, Any]]]:
    """What jobs lack: all of it, in the order in which it is made; and what is to be uploaded."""
    problems: list[str] = []
    if commands := missing_secrets(required_secrets(jobs)):
        text = "secrets are missing or lack a key (the values stay on Modal); make them with:"
        problems.append("\n  ".join([text, *commands]))
    uploads: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    hints: dict[str, str] = {}

    def look(entry: Mapping[str, Any]) -> None:
        name, path, local = entry["volume"], entry["path"], entry.get("local")
        if not path or (name, path) in seen:
            return
        seen.add((name, path))
        if exists(volume(name), path):
            return
        if not local or not Path(local).exists():
            for need in entry.get("requires") or []:
                look(need)
            remedy = f"; make it with:\n  {entry['remedy']}" if entry.get("remedy") else ""
            problems.append(f"{name}:{path} is missing, and a job needs it{remedy}")
            hints[name] = f"`modal volume ls {name}` shows what is there"
            return
        files = [file for file in [Path(local), *Path(local).rglob("*")] if file.is_file()]
        if (size := sum(file.stat().st_size for file in files)) > MOST_UPLOADED:
            problems.append(
                f"{local} ({size / 1e9:.1f} GB) is not on the Volume {name}; "
                f"upload it with `modal volume put {name} {local} {path}`"
            )
        uploads.append({**entry, "text": f"{local} -> {name}:{path} ({size / 1e6:.1f} MB)"})

    for job in jobs:
        for entry in job.settings.requires:
            look(entry)
    return [*problems, *hints.values()], uploads


def records_of(job: Job, seen: Records) -> dict[str, str]:
    """Digests of the records that a job's inputs have on their Volumes, by place."""
    digests: dict[str, str] = {}
    for entry in job.settings.requires:
        if entry.get("record") and entry["path"]:
            name, path = entry["volume"], f"{entry['path']}/{entry['record']}"
            place = f"{name}:{path}"
            if place not in seen:
                seen[place] = read_if_there(volume(name), path)
            if (content := seen[place]) is not None:
                digests[place] = hashlib.sha256(content).hexdigest()
    return digests


def check_cost(jobs: Sequence[Job], conf: ModalLauncherConf, ask: bool) -> None:
    """Ask, or refuse, when the estimate is above max_usd."""
    expected, most = totals(jobs, conf)
    if conf.max_usd is None or expected <= conf.max_usd:
        return
    estimate = (
        f"{len(jobs)} jobs are estimated at {expected:.0f} USD (prices of {cost.PRICES_DATE}; "
        f"at most {most:.0f} USD per attempt), above hydra.launcher.max_usd={conf.max_usd:g}"
    )
    if ask and sys.stdin.isatty() and sys.stderr.isatty():
        if confirmed(f"{estimate}. Go on?"):
            return
        raise LaunchError("nothing was spawned")
    raise LaunchError(
        f"{estimate}; allow it with hydra.launcher.max_usd={-(-expected // 10) * 10:.0f}, or say "
        f"how long a job takes with {conf.resources}.hours=..."
    )


def confirmed(question: str) -> bool:
    """Ask on the terminal."""
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def totals(jobs: Sequence[Job], conf: ModalLauncherConf) -> tuple[float, float]:
    """Estimate (a job without expected hours counts with all of its timeout) and the most."""
    both = [cost.estimate(job.settings, conf.prices) for job in jobs]
    return sum(most if hours is None else hours for hours, most in both), sum(m for _, m in both)
