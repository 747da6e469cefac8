"""What is shown while jobs run: a live table, or plain lines without a terminal."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from modal_sweep.client.cost import options_per_hour
from modal_sweep.protocol.journal import JobRecord
from modal_sweep.protocol.records import first_line

COLUMNS = ("job", "overrides", "state", "step", "loss", "elapsed", "about USD")
LEFT = ("overrides", "state", "gpu")
PLAIN_EVERY = 30.0
STYLES = {"completed": "green", "done": "green", "failed": "red", "cancelled": "yellow"}


def row(record: JobRecord, status: dict[str, Any], prices: dict[str, float]) -> tuple[str, ...]:
    """One job as the table's texts."""
    started = status.get("started")
    seconds = time.time() - started if started else None
    if record.end is not None:
        seconds = record.end.get("seconds")
    state = state_of(record, status) + (" (outputs not here)" if record.unpulled else "")
    attempt = status.get("attempt", 1)
    if attempt > 1:
        state += f" (attempt {attempt})"
    per_hour = options_per_hour(record.plan["options"], prices)
    loss = status.get("loss")
    return (
        str(record.number),
        " ".join(record.plan["overrides"]) or "-",
        state,
        str(status.get("step", "")),
        f"{loss:.4f}" if isinstance(loss, float) else "",
        "" if seconds is None else str(timedelta(seconds=int(seconds))),
        "" if seconds is None else f"{seconds / 3600 * per_hour:.2f}",
    )


def state_of(record: JobRecord, status: dict[str, Any]) -> str:
    """queued (for GPUs, an image), starting, running, preempted, completed, failed."""
    queued = "queued for GPUs" if record.plan["options"]["gpus"] else "queued"
    going = "not spawned" if record.call is None else status.get("state") or queued
    return record.status or str(going)


@dataclass
class Table:
    """Shows the state of a sweep; use as a context."""

    prices: dict[str, float] = field(default_factory=dict)
    live: Any = None
    printed: dict[str, tuple[str, float]] = field(default_factory=dict)
    shown: float = 0.0

    def __enter__(self) -> "Table":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), refresh_per_second=2, transient=False)
            self.live.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*failure)

    def note(self, text: str) -> None:
        """A line above the table."""
        if self.live is not None:
            self.live.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def show(
        self, records: Sequence[JobRecord], statuses: dict[str, Any], last: bool = False
    ) -> None:
        """Draw the table, at most twice a second; without a terminal say which states changed."""
        if not last and time.monotonic() - self.shown < 0.5:
            return
        self.shown = time.monotonic()
        rows = [row(record, statuses.get(record.key, {}), self.prices) for record in records]
        if self.live is not None:
            self.live.update(rich_table(rows))
            return
        for record, texts in zip(records, rows, strict=True):
            if record.end is None:
                self.plain_line(record.identity, texts)

    def plain_line(self, identity: str, texts: tuple[str, ...]) -> None:
        """Say that a job's state has changed, or every half minute how far it is."""
        number, overrides, state, step, loss, *_ = texts
        earlier, at = self.printed.get(identity, ("", 0.0))
        line = f"job {number} [{overrides}] {state}"
        now = time.monotonic()
        if step and now - at > PLAIN_EVERY:
            line += f", step {step}" + (f", loss {loss}" if loss else "")
        elif state == earlier:
            return
        self.printed[identity] = state, now
        self.note(line)

    def ended(self, record: JobRecord) -> None:
        """Say how a job ended."""
        end, why = record.end or {}, ""
        if record.broken:
            error = end.get("error") or {"type": "Error", "message": ""}
            why = f": {error['type']}: {first_line(error['message'])}"[:300]
        seconds = end.get("seconds")
        after = f" after {timedelta(seconds=int(seconds))}" if seconds is not None else ""
        if self.live is None or why:
            self.note(f"{record.label} {record.status}{after}{why}")


def rich_table(rows: Sequence[tuple[str, ...]], columns: Sequence[str] = COLUMNS) -> Any:
    """The rows as a rich table; a row has the style of its third text."""
    from rich.table import Table as RichTable

    table = RichTable()
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right")
    for texts in rows:
        table.add_row(*texts, style=STYLES.get(texts[2].split()[0]))
    return table
