"""Waiting for the jobs of a sweep: every end is collected as it comes, whatever the others do."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from modal_sweep.client import calls, collect, spawn
from modal_sweep.client.table import Table
from modal_sweep.errors import LaunchError, ResultGone
from modal_sweep.protocol.journal import JobRecord, Journal
from modal_sweep.protocol.outage import Outage, away
from modal_sweep.protocol.records import first_line

SLOW_LOOK = 20.0
OUTAGE = 900.0


@dataclass
class Watch:
    """One process's view of a sweep while it waits."""

    journal: Journal
    table: Table
    poll: float
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Envelopes of results, by identity."""
    looked: dict[str, float] = field(default_factory=dict)
    pause: float = 0.05

    @cached_property
    def statuses(self) -> calls.Statuses:
        """What the workers say about themselves."""
        return calls.Statuses(self.journal.sweep["dict"])

    @cached_property
    def outage(self) -> Outage:
        """A time without Modal; the jobs do not notice."""

        def too_long(error: Exception) -> LaunchError:
            return LaunchError(
                "Modal has not answered for 15 minutes; the jobs go on without this process. "
                f"Later: modal-sweep attach {self.journal.sweep_dir}"
            )

        return Outage(OUTAGE, too_long, self.table.note)

    def collect(self, records: Sequence[JobRecord]) -> dict[str, dict[str, Any]]:
        """Collect every job's envelope, by identity, and outputs that were left on Modal earlier.

        Raises:
            LaunchError: when Modal does not answer for 15 minutes; the jobs go on.
        """
        while pending := [record for record in records if record.end is None]:
            self.turn(records, pending, self.poll)
        for record in records:
            if record.unpulled:
                self.pull(record)
        self.table.show(records, self.statuses.latest, last=True)
        return self.ended

    def turn(self, records: Sequence[JobRecord], pending: Sequence[JobRecord], most: float) -> None:
        """Show the records and look at the pending ones; waits at most `most` seconds."""
        statuses = self.statuses.read(self.poll if self.table.live else 5 * self.poll)
        self.table.show(records, statuses)
        progress = self.round(pending)
        self.pause = 0.05 if progress else min(self.poll, self.pause * 1.5)
        left = [record for record in pending if record.end is None]
        if left and self.outage.since is None:
            self.settle(left[0], seconds=min(self.pause, most))
        elif left or not pending:
            time.sleep(min(self.poll, most))

    def round(self, pending: Sequence[JobRecord]) -> bool:
        """Look at the calls that have stopped running, and now and then at all others."""
        progress = False
        now = time.monotonic()
        for record in pending:
            due = now - self.looked.setdefault(record.identity, now) > SLOW_LOOK
            if record.key in self.statuses.gone or due:
                self.statuses.gone.discard(record.key)
                self.looked[record.identity] = now
                progress |= self.settle(record, seconds=0.0)
        return progress

    def settle(self, record: JobRecord, seconds: float) -> bool:
        """Look at one job's call; True when it has come to its end."""
        try:
            return self.look(record, seconds)
        except Exception as error:
            self.outage.lasts(error)
            return False

    def look(self, record: JobRecord, seconds: float) -> bool:
        """The same while Modal answers."""
        assert record.call is not None
        try:
            envelope = calls.look(record.call, seconds)
        except ResultGone:
            envelope = self.after_expiry(record)
        self.outage.over()
        if not envelope:
            return False
        if envelope["status"] == "duplicate":
            self.follow_owner(record, envelope["owner"])
            return False
        return self.bring(record, envelope)

    def bring(self, record: JobRecord, envelope: dict[str, Any]) -> bool:
        """Collect an end. Outputs that cannot be brought stay on Modal: the end counts without."""
        left = None
        try:
            collect.bring(self.journal, record, envelope)
        except (OSError, ValueError) as error:
            if away(error):
                raise
            left = first_line(error)
        collect.note_end(self.journal, record, envelope, left)
        self.ended[record.identity] = envelope
        self.table.ended(record)
        return True

    def pull(self, record: JobRecord) -> None:
        """Try once more to bring the outputs of a job that has ended."""
        try:
            collect.pull(self.journal, record)
        except Exception as error:
            if not (isinstance(error, OSError | ValueError) or away(error)):
                raise
            self.table.note(f"job {record.number}: outputs not here yet ({first_line(error)})")

    def follow_owner(self, record: JobRecord, owner: str) -> None:
        """Another call, spawned before a kill, owns the job: wait for that one."""
        try:
            envelope = calls.look(owner)
            lost = envelope is not None and envelope["status"] == "cancelled"
        except ResultGone:
            lost = not collect.saved_result(self.journal, record)
        if lost:
            self.respawn(record, "its owner ended without a result")
        else:
            self.journal.write([record.event("spawn", call=owner)])

    def after_expiry(self, record: JobRecord) -> dict[str, Any]:
        """A call's result is gone: the Volume has it, or the job runs again."""
        saved = collect.saved_result(self.journal, record)
        if not saved:
            self.respawn(record, "its call has expired without a result")
        return saved

    def respawn(self, record: JobRecord, why: str) -> None:
        """Open the job's next generation."""
        self.table.note(f"job {record.number} runs again: {why}")
        spawn.respawn(self.journal, record)
