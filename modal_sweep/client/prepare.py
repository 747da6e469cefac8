"""Jobs into a sweep on Modal: what they need is checked, the app deployed, the calls spawned."""

import hashlib
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modal_sweep.client import deploy, image, plan, preflight, spawn
from modal_sweep.config import ModalLauncherConf
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.journal import Journal

log = logging.getLogger(__name__)
PATIENCE = 30.0


@dataclass
class Spawner:
    """What one process spawns jobs with."""

    journal: Journal
    conf: ModalLauncherConf
    common: bytes
    """What is sent once for all jobs."""
    alike: bytes
    """Part of `common`: what the payloads are compressed against."""
    search: bool = False
    """Jobs come one by one; the next ones depend on how they end."""
    functions: deploy.Functions = field(default_factory=deploy.Functions)
    ready: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `prepare` returned, by what it was for."""


def spawn_all(spawner: Spawner, jobs: Sequence[plan.Job], times: int = 1) -> dict[str, str]:
    """Check what is about to run, deploy, spawn.

    Args:
        times: how many times the jobs are expected to come, for the estimate of the cost.

    Returns:
        By identity: spawned, attached or done.
    """
    journal, conf = spawner.journal, spawner.conf
    with journal.locked(PATIENCE if spawner.search else 0.0):
        spawn.refuse_other_code(journal, jobs)
        fresh = [
            job
            for job in jobs
            if spawn.will_spawn(journal.jobs.get(job.identity), conf, spawner.search)
        ]
        sweep = prepare(spawner, jobs, fresh, times)
        events = [plan.plan_event(job, conf, sweep, spawner.alike) for job in fresh]
        if events:  # written down before anything is spawned
            journal.write(events)
        records = [journal.jobs[job.identity] for job in jobs]
        spawned = {job.identity for job in fresh}
        return spawn.submit(journal, records, spawned, conf, spawner.functions)


def prepare(
    spawner: Spawner, jobs: Sequence[plan.Job], fresh: Sequence[plan.Job], times: int
) -> dict[str, Any]:
    """Everything that jobs need before they are spawned, once for jobs of the same kind."""
    journal, conf = spawner.journal, spawner.conf
    needs = [[job.function, plan.job_kind(job.settings), job.settings.requires] for job in fresh]
    key = image.digest(needs)
    if key in spawner.ready:
        return spawner.ready[key]
    preflight.check_secrets(fresh)
    for line in preflight.check_requires(fresh, push=True):
        log.info(f"\tuploaded {line}")
    preflight.check_cost([*fresh] * times, conf, ask=True)
    for name in preflight.wanted_volumes(fresh, volume_name(conf)):
        deploy.volume(name).hydrate()
    sweep = begin(journal, jobs, conf, spawner.common)
    if fresh and deploy.deploy(sweep["app"], jobs, {**conf.tags, "sweep": sweep["id"]}):
        log.info(f"\tdeployed {sweep['app']}")
    spawn.stage_common(journal, spawner.common, sweep["common"])
    spawner.ready[key] = sweep
    return sweep


def volume_name(conf: ModalLauncherConf) -> str:
    """The Volume for outputs and results."""
    return conf.volume or f"{conf.app}-sweeps"


def begin(
    journal: Journal, jobs: Sequence[plan.Job], conf: ModalLauncherConf, common: bytes
) -> dict[str, Any]:
    """The sweep's own line in the journal, written once; with this launch's app and common part."""
    if not journal.sweep:
        name = secrets.token_hex(6)
        journal.write(
            [
                {
                    "event": "sweep",
                    "id": name,
                    "dict": f"{conf.app}-sweep-{name}",
                    "volume": volume_name(conf),
                    "argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
                    "cwd": os.getcwd(),
                }
            ]
        )
    return {
        **journal.sweep,
        "app": deploy.app_name(conf.app, jobs),
        "common": hashlib.sha256(common).hexdigest(),
        "max_containers": share_parallel(jobs, conf.max_parallel),
    }


def share_parallel(jobs: Sequence[plan.Job], most: int | None) -> dict[str, int]:
    """Containers per kind of job, so that together they are at most `most`."""
    if most is None:
        return {}
    counts: dict[str, int] = {}
    for job in jobs:
        kind = plan.job_kind(job.settings)
        counts[kind] = counts.get(kind, 0) + 1
    if len(counts) > most:
        raise LaunchError(
            f"hydra.launcher.max_parallel={most} but the jobs need {len(counts)} kinds of "
            "machines, which Modal limits one by one; raise it or launch the kinds separately"
        )
    shares = dict.fromkeys(counts, 1)
    for _ in range(most - len(counts)):
        kind = max(counts, key=lambda kind: counts[kind] / shares[kind])
        shares[kind] += 1
    return shares
