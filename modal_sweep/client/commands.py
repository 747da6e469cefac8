"""The commands of modal-sweep, one function each; they return the exit code."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from modal_sweep.client import calls, collect, messages, preflight, spawn
from modal_sweep.client.failures import modal_errors
from modal_sweep.client.table import Table, rich_table, row, state_of
from modal_sweep.client.volumes import volume
from modal_sweep.client.watch import Watch
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.journal import FOLDER, JobRecord, Journal
from modal_sweep.protocol.names import status_dict
from modal_sweep.protocol.records import write_whole


def list_sweeps(arguments: argparse.Namespace) -> int:
    """Sweeps below a folder, from what is on the disk."""
    paths = sorted(arguments.folder.rglob(f"{FOLDER}/jobs.jsonl"))
    for path in paths:
        journal = Journal(path.parent.parent)
        states = [state_of(record, {"state": "in flight"}) for record in journal.ordered()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        print(f"{journal.sweep_dir}  {len(states)} jobs: {counts}")
    if not paths:
        print(f"no sweeps below {arguments.folder}")
    return 0


def opened(sweep: Path) -> Journal:
    """A sweep's journal; raises LaunchError: there is none, or it lives elsewhere on Modal."""
    journal = Journal(sweep)
    if not journal.sweep:
        raise LaunchError(
            f"{sweep} is not a sweep on Modal (no {FOLDER}/jobs.jsonl); "
            "`modal-sweep list <folder>` finds them"
        )
    preflight.refuse_elsewhere(journal)
    return journal


def status(arguments: argparse.Namespace) -> int:
    """One look at every job, without waiting."""
    journal = opened(arguments.sweep)
    records = journal.ordered()
    watch = Watch(journal, Table(), poll=1.0)
    for record in records:
        if record.call is not None and record.end is None:
            watch.settle(record, seconds=0.0)
    statuses = calls.Statuses(journal.sweep["dict"]).read()
    rows = [row(record, statuses.get(record.key, {}), {}) for record in records]
    messages.console_print(rich_table(rows))
    return exit_code(journal.current())


def exit_code(records: Sequence[JobRecord]) -> int:
    """1 when a job ended without a result, or its outputs are not here."""
    return int(any(record.broken or record.unpulled for record in records))


def attach(arguments: argparse.Namespace) -> int:
    """Wait for the jobs and bring their results."""
    journal = opened(arguments.sweep)
    with journal.locked():
        records = journal.current()
        for record in records:
            if record.call is None:  # a kill came between
                spawn.respawn(journal, record)
    return finish(journal, records)


def finish(journal: Journal, records: Sequence[JobRecord]) -> int:
    """Wait with a table, then say how the sweep ended."""
    try:
        with modal_errors(journal), Table() as table:
            Watch(journal, table, poll=1.0).collect(records)
    except KeyboardInterrupt:
        messages.detached(journal)
        return 130
    messages.summary(journal, records)
    for record in records:
        if record.broken:
            messages.say(messages.failure_text(journal, record))
    return exit_code(records)


def by_number(journal: Journal, numbers: Sequence[int]) -> list[JobRecord]:
    """The newest job of each number, once; raises LaunchError for a number that there is not."""
    records = {record.number: record for record in journal.ordered()}
    for number in numbers:
        if number not in records:
            listed = ", ".join(map(str, sorted(records)))
            raise LaunchError(f"{journal.sweep_dir} has no job {number}; it has: {listed}")
    return [records[number] for number in dict.fromkeys(numbers)]


def logs(arguments: argparse.Namespace) -> int:
    """What a job has printed, saved or from Modal's log."""
    journal = opened(arguments.sweep)
    [record] = by_number(journal, [arguments.job])
    saved = collect.log_text(journal, record)
    if saved is not None and record.end is not None:
        sys.stdout.write(saved)
        return 0
    if record.call is None:
        raise LaunchError(f"job {record.number} was not spawned yet: modal-sweep attach")
    import modal

    for entry in modal.FunctionCall.from_id(record.call).logs.tail(1000):
        sys.stdout.write(str(getattr(entry, "text", entry)))
    return 0


def pull(arguments: argparse.Namespace) -> int:
    """Bring outputs again; what is here costs nothing."""
    journal = opened(arguments.sweep)
    fetched, records = 0, journal.current()
    several = len({name for record in records for name, _ in places(record)}) > 1
    for record in records:
        try:
            fetched += collect.pull(journal, record)
        except FileNotFoundError:
            messages.say(f"job {record.number}: nothing was saved yet")
            continue
        if arguments.checkpoints:
            target = arguments.to or collect.job_folder(journal, record) / "checkpoints"
            for name, path in places(record):
                below = target / name if several else target  # two may have the same path
                fetched += pull_folder(name, path, below / path)
    print(f"{fetched} files fetched into {journal.sweep_dir}")
    return int(any(record.unpulled for record in records))


def places(record: JobRecord) -> list[tuple[str, str]]:
    """What a job alone writes to, as a Volume and a path there."""
    found = []
    for folder in record.plan["unique"]:
        for mount, name in record.plan["options"]["volumes"].items():
            if folder == mount or folder.startswith(mount.rstrip("/") + "/"):
                found.append((name, folder[len(mount.rstrip("/")) :].strip("/")))
    return found


def pull_folder(name: str, path: str, target: Path) -> int:
    """Copy a folder of a Volume; files of the same size and a newer date here are kept."""
    source = volume(name)
    fetched = 0
    for entry in source.iterdir(path, recursive=True):
        if entry.type.name != "FILE":
            continue
        here = target / Path(entry.path).relative_to(path)
        same = here.is_file() and here.stat().st_size == entry.size
        if not (same and here.stat().st_mtime >= entry.mtime):
            messages.say(f"{name}:{entry.path} ({entry.size / 1e6:.1f} MB)")
            write_whole(here, source.read_file(entry.path))
            fetched += 1
    return fetched


def cancel(arguments: argparse.Namespace) -> int:
    """End jobs; what they saved stays."""
    journal = opened(arguments.sweep)
    records = by_number(journal, arguments.job) if arguments.job else journal.ordered()
    count = sum(spawn.cancel(journal, record) for record in records)
    print(f"{count} jobs cancelled; what they saved stays, the launching command runs them again")
    return 0


def rerun(arguments: argparse.Namespace) -> int:
    """Run jobs again, with the same code."""
    journal = opened(arguments.sweep)
    with journal.locked():
        records = by_number(journal, arguments.job)
        if arguments.failed:
            records += [r for r in journal.current() if r.broken and r not in records]
        if not records:
            raise LaunchError("nothing to run again: name job numbers, or --failed")
        for record in records:
            if spawn.still_runs(record):
                raise LaunchError(
                    f"job {record.number} is still running: "
                    f"modal-sweep cancel {journal.sweep_dir} {record.number}"
                )
        for record in records:
            spawn.respawn(journal, record)
    return finish(journal, records)


def clean(arguments: argparse.Namespace) -> int:
    """Delete a sweep's files on Modal, not those here."""
    import modal

    journal = opened(arguments.sweep)
    if any(spawn.still_runs(record) for record in journal.ordered()):
        raise LaunchError(f"jobs are running: modal-sweep cancel {journal.sweep_dir} first")
    place = f"{journal.sweep['volume']}:{journal.sweep['id']}"
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise LaunchError(f"would delete {place} on Modal; confirm with --yes")
        if not preflight.confirmed(f"delete {place} on Modal?"):
            return 1
    with contextlib.suppress(FileNotFoundError, modal.exception.NotFoundError):
        volume(journal.sweep["volume"]).remove_file(journal.sweep["id"], recursive=True)
    for name in (journal.sweep["dict"], status_dict(journal.sweep["dict"])):
        modal.Dict.objects.delete(name, allow_missing=True)
    print(f"{place} and the sweep's Dict are gone; {journal.sweep_dir} is as it was")
    return 0
