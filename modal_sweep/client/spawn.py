"""Spawning: every call's id is on the disk before the next call is spawned."""

import base64
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from modal_sweep.client import calls, deploy, plan
from modal_sweep.config import ModalLauncherConf
from modal_sweep.container.cloud import COMMON_DICT, status_dict
from modal_sweep.errors import LaunchError, ResultGone
from modal_sweep.protocol.journal import FOLDER, JobRecord, Journal
from modal_sweep.protocol.outputs import write


def stage_common(journal: Journal, common: bytes, digest: str) -> None:
    """Put what all jobs share where the workers find it, and keep a copy for later restarts."""
    import modal

    for name in (journal.sweep["dict"], status_dict(journal.sweep["dict"])):
        modal.Dict.from_name(name, create_if_missing=True).hydrate()
    folder = journal.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"common-{digest[:16]}.bin"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_bytes(common)
        partial.replace(path)
    shared = modal.Dict.from_name(COMMON_DICT, create_if_missing=True)
    shared.put(digest, common, skip_if_exists=True)


def restage(journal: Journal, record: JobRecord) -> None:
    """Make sure that the common part of an earlier launch is still there."""
    digest = record.plan["ref"]["common"]
    path = journal.folder / f"common-{digest[:16]}.bin"
    if path.exists():
        stage_common(journal, path.read_bytes(), digest)


def alike(sweep_dir: Path, first: bytes) -> bytes:
    """What a sweep's payloads are compressed against: the first configuration it ever had.

    The same in every launch, so that the common part is the same and staged once.
    """
    path = sweep_dir / FOLDER / "alike.bin"
    if not path.exists():
        write(path.parent, path.name, [first])
    held: bytes = path.read_bytes()
    return held


def will_spawn(record: JobRecord | None, conf: ModalLauncherConf, search: bool) -> bool:
    """Whether a launch spawns a job: it never ran, was cancelled, or has no result to keep.

    A search may not have heard of a failure before it was killed: then that is the result.
    """
    if record is None or record.call is None:
        return True
    if record.end is None:
        return record.call in record.cancelled
    if record.end["status"] == "completed":
        return conf.if_done != "skip"
    unheard = search and record.generation not in record.told
    return not (unheard and record.end["status"] == "failed")


def refuse_other_code(journal: Journal, jobs: Sequence[plan.Job]) -> None:
    """Refuse to mix versions of the code while jobs of another one are running."""
    ours = {job.identity for job in jobs}
    codes = {job.code.digest for job in jobs}
    running = [
        record
        for record in journal.ordered()
        if record.identity not in ours
        and record.plan["code"] not in codes
        and record.call is not None
        and record.end is None
        and still_runs(record)
    ]
    if running:
        numbers = ", ".join(str(record.number) for record in running)
        raise LaunchError(
            f"{journal.sweep_dir} has jobs of other code in flight (job {numbers}); "
            f"`modal-sweep attach {journal.sweep_dir}` waits for them, "
            f"`modal-sweep cancel {journal.sweep_dir}` ends them"
        )


def still_runs(record: JobRecord) -> bool:
    """Whether the newest call has no result yet."""
    assert record.call is not None
    try:
        return calls.look(record.call) is None
    except ResultGone:
        return False


def spawn(
    journal: Journal, record: JobRecord, functions: deploy.Functions, generation: int
) -> None:
    """Spawn one generation of a job and write its call id down."""
    reference = {**record.plan["ref"], "key": f"{record.identity}.{generation}"}
    call = functions.spawn(record.plan, reference, base64.b64decode(record.plan["payload"]))
    journal.write([spawn_event(record, generation, call)])


def spawn_event(record: JobRecord, generation: int, call: str) -> dict[str, Any]:
    """The journal's line for a call."""
    return {
        "event": "spawn",
        "identity": record.identity,
        "generation": generation,
        "call": call,
        "app": record.plan["app"],
        "function": record.plan["function"],
    }


def submit(
    journal: Journal,
    records: Sequence[JobRecord],
    wanted: Container[str],
    conf: ModalLauncherConf,
    functions: deploy.Functions,
) -> dict[str, str]:
    """Spawn the jobs with the wanted identities; what is running is left alone.

    Returns:
        By identity: spawned, attached or done.
    """
    done = [record for record in records if record.end and record.end["status"] == "completed"]
    if done and conf.if_done == "fail":
        raise LaunchError(
            f"job {done[0].number} has a result with this code and configuration already "
            f"(in {journal.sweep_dir}); hydra.launcher.if_done=skip takes it, =rerun makes it again"
        )
    said = {}
    for record in records:
        if record.identity in wanted:
            spawn(journal, record, functions, record.generation + (record.call is not None))
            said[record.identity] = "spawned"
        else:
            said[record.identity] = "done" if record.end else "attached"
    return said


def cancel(journal: Journal, record: JobRecord) -> bool:
    """End a job that runs or waits; False when there is nothing to end."""
    import modal

    if record.call is None or record.end is not None:
        return False
    journal.write([{"event": "cancel", "identity": record.identity, "call": record.call}])
    modal.FunctionCall.from_id(record.call).cancel()
    return True
