"""Spawn: what jobs need is checked, the app deployed, the calls spawned and written down.

Every call's id is on the disk before the next call is spawned.
"""

import base64
import hashlib
import logging
import os
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modal_sweep.client import calls, preflight
from modal_sweep.client.deploy import app_name, deploy, spawn_call
from modal_sweep.client.image import digest
from modal_sweep.client.plan import Job, job_kind, plan_event
from modal_sweep.client.settings import volume_name
from modal_sweep.client.volumes import upload, volume
from modal_sweep.config import ModalLauncherConf
from modal_sweep.errors import LaunchError, ResultGone
from modal_sweep.protocol.journal import JobRecord, Journal
from modal_sweep.protocol.names import COMMON_DICT, status_dict
from modal_sweep.protocol.outputs import file_digest
from modal_sweep.protocol.records import write_whole

log = logging.getLogger(__name__)
PATIENCE = 30.0


@dataclass
class Spawner:
    """What one process spawns jobs with."""

    journal: Journal
    conf: ModalLauncherConf
    common: bytes
    """What is sent once for all jobs."""
    search: bool = False
    """Jobs come one by one; the next ones depend on how they end."""
    prepared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `prepare` returned, by what it was for."""


def spawn_jobs(spawner: Spawner, jobs: Sequence[Job], times: int = 1) -> dict[str, str]:
    """Check what is about to run, deploy, spawn; what is running is left alone.

    Args:
        times: how many times the jobs are expected to come, for the estimate of the cost.

    Returns:
        By identity: spawned, attached or done.
    """
    journal, conf = spawner.journal, spawner.conf
    with journal.locked(PATIENCE if spawner.search else 0.0):
        refuse_other_code(journal, jobs)
        before: preflight.Records = {}
        fresh = [
            job
            for job in jobs
            if will_spawn(spawner, record := journal.jobs.get(job.identity))
            or (record and of_other_inputs(record, job, before))
        ]
        sweep = prepare(spawner, jobs, fresh, times)
        current = [record.identity for record in journal.current()]
        other = [job for job in jobs if job not in fresh and job.identity not in current]
        # Written down before anything is spawned.
        now: preflight.Records = {}  # something may have been uploaded
        journal.write(
            plan_event(job, conf, sweep) | {"inputs": preflight.records_of(job, now)}
            for job in [*fresh, *other]
        )
        for end in (journal.jobs[job.identity].end for job in other):
            if end is not None:
                journal.write([end | {"unpulled": "another job's came into its folder since"}])
        records = [journal.jobs[job.identity] for job in jobs]
        refuse_done(journal, records, conf)
        states = {record.identity: "done" if record.end else "attached" for record in records}
        for record in [journal.jobs[job.identity] for job in fresh]:
            spawn_next(journal, record)
            states[record.identity] = "spawned"
        return states


def refuse_done(journal: Journal, records: Sequence[JobRecord], conf: ModalLauncherConf) -> None:
    """With if_done=fail: refuse when a job has a result."""
    done = [record for record in records if record.status == "completed"]
    if done and conf.if_done == "fail":
        raise LaunchError(
            f"job {done[0].number} has a result with this code and configuration already "
            f"(in {journal.sweep_dir}); hydra.launcher.if_done=skip takes it, =rerun makes it again"
        )


def prepare(
    spawner: Spawner, jobs: Sequence[Job], fresh: Sequence[Job], times: int
) -> dict[str, Any]:
    """Everything that jobs need before they are spawned, once for jobs of the same kind."""
    journal, conf = spawner.journal, spawner.conf
    needs = [[job.function, job_kind(job.settings), job.settings.requires] for job in fresh]
    key = digest(needs)
    if key in spawner.prepared:
        return spawner.prepared[key]
    lives = preflight.refuse_elsewhere(journal, conf)
    problems, uploads = preflight.inputs(fresh)
    if problems:
        raise LaunchError("\n".join(problems))
    for entry in uploads:
        upload(volume(entry["volume"]), Path(entry["local"]), entry["path"])
        log.info(f"\tuploaded {entry['text']}")
    preflight.check_cost([*fresh] * times, conf, ask=True)
    for name in preflight.volume_names(fresh, volume_name(conf)):
        volume(name).hydrate()
    sweep = begin(spawner, jobs, lives)
    if fresh and deploy(sweep["app"], jobs, {**conf.tags, "sweep": sweep["id"]}):
        log.info(f"\tdeployed {sweep['app']}")
    stage_common(journal, spawner.common, sweep["common"])
    spawner.prepared[key] = sweep
    return sweep


def begin(spawner: Spawner, jobs: Sequence[Job], lives: dict[str, str]) -> dict[str, Any]:
    """The sweep's own line in the journal, written once; with this launch's app and common part.

    Args:
        lives: where the sweep is, as `preflight` says it.
    """
    journal, conf = spawner.journal, spawner.conf
    if not journal.sweep:
        name = secrets.token_hex(6)
        event = {
            "event": "sweep",
            "id": name,
            "dict": f"{conf.app}-sweep-{name}",
            **lives,
            "argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
            "cwd": os.getcwd(),
        }
        journal.write([event])
    return {
        **journal.sweep,
        "app": app_name(conf.app, jobs),
        "common": hashlib.sha256(spawner.common).hexdigest(),
        "max_containers": share_parallel(jobs, conf.max_parallel),
    }


def share_parallel(jobs: Sequence[Job], most: int | None) -> dict[str, int]:
    """Containers per kind of job, so that together they are at most `most`."""
    if most is None:
        return {}
    counts = Counter(job_kind(job.settings) for job in jobs)
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


def stage_common(journal: Journal, common: bytes, sha256: str) -> None:
    """Put what all jobs share where the workers find it, and keep a copy for later restarts."""
    import modal

    for name in (journal.sweep["dict"], status_dict(journal.sweep["dict"])):
        modal.Dict.from_name(name, create_if_missing=True).hydrate()
    path = journal.folder / f"common-{sha256[:16]}.bin"
    if not is_whole(path, sha256):
        write_whole(path, [common])
    shared = modal.Dict.from_name(COMMON_DICT, create_if_missing=True)
    shared.put(sha256, common, skip_if_exists=True)


def respawn(journal: Journal, record: JobRecord) -> None:
    """Spawn a job of an earlier launch, with the common part that it had."""
    sha256 = record.plan["ref"]["common"]
    path = journal.folder / f"common-{sha256[:16]}.bin"
    if is_whole(path, sha256):
        stage_common(journal, path.read_bytes(), sha256)
    spawn_next(journal, record)


def is_whole(path: Path, sha256: str) -> bool:
    """Whether a file is there and has that digest."""
    return path.exists() and file_digest(path) == sha256


def will_spawn(spawner: Spawner, record: JobRecord | None) -> bool:
    """Whether a launch spawns a job: it never ran, was cancelled, or has no result to keep.

    A search may not have heard of a failure before it was killed: then that is the result.
    """
    if record is None or record.call is None:
        return True
    if record.end is None:
        return record.call in record.cancelled
    if not record.broken:
        return spawner.conf.if_done != "skip"
    unheard = spawner.search and record.generation not in record.told
    return not (unheard and record.status == "failed")


def of_other_inputs(record: JobRecord, job: Job, seen: preflight.Records) -> bool:
    """Whether a job's result is of inputs with other records than there are now; what is not there
    any more, or was not looked at, is no other one."""
    if record.status != "completed":
        return False
    before, now = record.plan.get("inputs", {}), preflight.records_of(job, seen)
    changed = [place for place in before if now.get(place, before[place]) != before[place]]
    if changed:
        log.info(f"\t{record.label} runs again: {', '.join(changed)} has changed")
    return bool(changed)


def refuse_other_code(journal: Journal, jobs: Sequence[Job]) -> None:
    """Refuse to mix versions of the code, or two jobs in one folder, while the others run."""
    ours = {job.identity for job in jobs}
    codes = {job.code.digest for job in jobs}
    places = {place for job in jobs for place in (job.output_dir, *job.settings.unique)}
    running = [
        record
        for record in journal.ordered()
        if record.identity not in ours
        and (record.plan["code"] not in codes or places & written_by(record))
        and still_runs(record)
    ]
    if running:
        numbers = ", ".join(str(record.number) for record in running)
        what = "of other code" if running[0].plan["code"] not in codes else "that write there"
        raise LaunchError(
            f"{journal.sweep_dir} has jobs {what} in flight (job {numbers}); "
            f"`modal-sweep attach {journal.sweep_dir}` waits for them, "
            f"`modal-sweep cancel {journal.sweep_dir}` ends them"
        )


def written_by(record: JobRecord) -> set[str]:
    """Places that a job writes."""
    return {record.plan["ref"]["output_dir"], *record.plan["unique"]}


def still_runs(record: JobRecord) -> bool:
    """Whether the newest call has no result yet."""
    if record.call is None or record.end is not None:
        return False
    try:
        return calls.look(record.call) is None
    except ResultGone:
        return False


def spawn_next(journal: Journal, record: JobRecord) -> None:
    """Spawn a job, as its next generation when it was spawned before; write its call id down."""
    generation = record.generation + (record.call is not None)
    reference = {**record.plan["ref"], "key": f"{record.identity}.{generation}"}
    call = spawn_call(record.plan, reference, base64.b64decode(record.plan["payload"]))
    journal.write([record.event("spawn", generation=generation, call=call)])


def cancel(journal: Journal, record: JobRecord) -> bool:
    """End a job that runs or waits; False when there is nothing to end."""
    import modal

    if record.call is None or record.end is not None:
        return False
    journal.write([{"event": "cancel", "identity": record.identity, "call": record.call}])
    modal.FunctionCall.from_id(record.call).cancel()
    return True
