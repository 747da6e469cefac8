"""Jobs that are kept in flight one by one: what a search drives that does not wait for batches."""

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from modal_sweep.client import collect, messages, plan, preflight
from modal_sweep.client.failures import advice, modal_errors
from modal_sweep.client.spawn import Spawner, cancel, spawn_jobs
from modal_sweep.client.table import Table
from modal_sweep.client.watch import Watch
from modal_sweep.errors import JobFailed
from modal_sweep.protocol import payload, progress
from modal_sweep.protocol.journal import JobRecord, Journal
from modal_sweep.protocol.outage import patiently

SAVING = 15.0
SHOWN = 12


class Session:
    """Calls in flight, known by the numbers that the sweeper gives its jobs.

    A number with the same overrides continues the call that an earlier process has spawned for it.
    """

    def __init__(
        self, config: DictConfig, context: HydraContext, task: TaskFunction, total: int
    ) -> None:
        self.sweep = plan.open_sweep(config, context, task)
        self.conf, self.left = self.sweep.conf, total
        plan.refuse_search(self.sweep)
        self.journal = Journal(self.sweep.folder)
        self.table = Table(self.conf.prices)
        common = payload.pack(context, task)
        self.spawner = Spawner(self.journal, self.conf, common, search=True)
        self.watch = Watch(self.journal, self.table, self.conf.poll)
        self.jobs: dict[int, plan.Job] = {}
        """Started, and its end not given yet."""
        self.unmade: list[tuple[int, JobReturn]] = []
        self.untold: list[dict[str, Any]] = []
        """Lines for the journal: failures that were given by the last call."""
        self.stopped: dict[str, float] = {}
        """By identity: until when a stopped job may save."""
        self.heard: dict[int, set[str]] = {}
        self.new: dict[int, list[dict[str, Any]]] = {}

    def start(self, number: int, overrides: Sequence[str]) -> None:
        """Spawn a job, or attach to its call, or take its result.

        What is wrong with this job alone becomes a failed end.

        Raises:
            LaunchError: for what concerns all jobs: secrets, inputs, cost, other code, Modal.
        """
        try:
            [job] = plan.plan_jobs(self.sweep, [overrides], number)
            preflight.check_jobs([job])
            others = [other for other in self.jobs.values() if other.identity != job.identity]
            preflight.refuse_same_places([*others, job])
        except Exception as error:
            failed = JobStatus.FAILED
            self.unmade.append((number, JobReturn(overrides, status=failed, _return_value=error)))
            return
        if self.conf.setup:
            messages.rehearse([job], self.conf, self.sweep.folder)
            raise SystemExit(0)
        with modal_errors(self.journal, lambda: advice(job)):
            state = self.spawn(job)
        self.jobs[number] = job
        self.left -= 1
        if not self.table.live:
            self.table.__enter__()
        self.table.note(f"{job.label} {state}")

    def spawn(self, job: plan.Job) -> str:
        """Spawned, attached or done; waits while Modal is away, but not for the first job."""

        def step() -> dict[str, str]:
            return spawn_jobs(self.spawner, [job], max(1, self.left))

        first = not self.spawner.prepared
        state = (step() if first else patiently(step, self.watch.outage))[job.identity]
        if state == "spawned":
            self.watch.ended.pop(job.identity, None)
            self.stopped.pop(job.identity, None)
        elif job.identity not in self.watch.ended and self.journal.jobs[job.identity].unpulled:
            self.watch.pull(self.journal.jobs[job.identity])
        return state

    def ended(self, seconds: float) -> list[tuple[int, JobReturn]]:
        """Wait at most `seconds` for an end; all ends since the last call, outputs brought.

        Raises:
            LaunchError: when Modal does not answer for 15 minutes; the jobs go on.
        """
        until = time.monotonic() + seconds
        self.tell()
        unmade, self.unmade = self.unmade, []
        with modal_errors(self.journal):
            over = self.over()
            while self.jobs and not over and not unmade:
                most = max(0.0, until - time.monotonic())
                self.watch.turn(self.shown(), self.pending(), most)
                first = next(iter(self.jobs))  # the one that was waited for is the last now
                self.jobs[first] = self.jobs.pop(first)
                over = self.over()
                if time.monotonic() >= until:
                    break
            return unmade + [(number, self.give(number)) for number in over]

    def tell(self) -> None:
        """Whoever drives the session has dealt with what it was given before this call."""
        if self.untold:
            self.journal.write(self.untold)
            self.untold = []

    def record(self, number: int) -> JobRecord:
        """What the journal says of a job in flight."""
        return self.journal.jobs[self.jobs[number].identity]

    def over(self) -> list[int]:
        """Jobs that have ended; stopped ones when they have saved."""
        records = {number: self.record(number) for number in self.jobs}
        return [number for number, job in records.items() if job.end and not self.saving(job)]

    def saving(self, record: JobRecord) -> bool:
        """Whether the container of a stopped job is still at it."""
        state = self.watch.statuses.latest.get(record.key, {}).get("state", "cancelled")
        return state != "cancelled" and time.monotonic() < self.stopped.get(record.identity, 0.0)

    def pending(self) -> list[JobRecord]:
        """Jobs without an end."""
        identities = dict.fromkeys(job.identity for job in self.jobs.values())
        records = [self.journal.jobs[identity] for identity in identities]
        return [record for record in records if record.end is None]

    def shown(self) -> list[JobRecord]:
        """What the table shows: the latest ends, and what is in flight."""
        ended = [record for record in self.journal.ordered() if record.end is not None]
        return ended[-SHOWN:] + sorted(self.pending(), key=lambda record: record.number)

    def give(self, number: int) -> JobReturn:
        """A job's end as Hydra's record; with what a cancelled one has saved, if anything."""
        from modal.exception import Error

        record, job = self.record(number), self.jobs.pop(number)
        if record.status == "failed":
            self.untold.append(record.event("told"))
        cancelled = record.status == "cancelled"
        if cancelled:
            with contextlib.suppress(OSError, ValueError, Error):
                collect.pull(self.journal, record)
        reference = record.plan["ref"]
        place = progress.place(reference["progress_file"] or "", Path(reference["output_dir"]))
        path = collect.output_dir(self.journal, record) / place
        tail = progress.Tail(path, reference["progress_keys"], most=None)
        self.hear(number, tail.look().reports)
        ended = self.watch.ended.get(job.identity)
        returned = collect.job_return(job, record, ended, self.journal)
        if cancelled and job.identity in self.stopped:
            returned.return_value = JobFailed(f"{job.label} was stopped; what it saved stays")
        return returned

    def reports(self) -> dict[int, list[dict[str, Any]]]:
        """Step and `progress_keys` of the new lines of progress files, by number.

        Every line once; those of a job that is over come after its end was given.
        """
        if self.jobs:
            statuses = self.watch.statuses.read(self.conf.poll)
            for number in self.jobs:
                self.hear(number, statuses.get(self.record(number).key, {}).get("reports", []))
        new, self.new = self.new, {}
        return new

    def hear(self, number: int, lines: Iterable[dict[str, Any]]) -> None:
        """Keep the lines that are new."""
        heard = self.heard.setdefault(number, set())
        for line in lines:
            text = json.dumps(line)
            if text not in heard:
                heard.add(text)
                self.new.setdefault(number, []).append(line)

    def stop(self, number: int) -> None:
        """Cancel a job, as `modal-sweep cancel` does; it saves, then its end follows."""
        if number not in self.jobs:
            return
        record = self.record(number)
        with modal_errors(self.journal):
            if patiently(lambda: cancel(self.journal, record), self.watch.outage):
                self.stopped[record.identity] = time.monotonic() + SAVING
                self.watch.looked[record.identity] = 0.0

    def close(self) -> None:
        """End the table; jobs in flight go on, and the next start of them attaches."""
        self.tell()
        self.table.__exit__(None, None, None)
        if self.jobs:
            messages.detached(self.journal)
        self.jobs.clear()
