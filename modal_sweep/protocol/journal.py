"""jobs.jsonl: what was asked for and what was spawned, on disk before anything else happens.

sweep  id, Dict, and where it lives: workspace, environment, app prefix, Volume; written once
plan   a job: everything that is needed to spawn it, also by a process that never saw its config
spawn  generation and call id; flushed to the disk before the next call is spawned
end    how a generation ended; `unpulled` says why its outputs are not here yet
cancel asked for by modal-sweep cancel, or by a search
told   a search has heard of a failure
"""

import fcntl
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modal_sweep.errors import LaunchError
from modal_sweep.protocol.records import append_lines, whole_lines

FOLDER = "modal"


@dataclass
class JobRecord:
    """One job as the journal knows it."""

    plan: dict[str, Any]
    generation: int = 0
    calls: dict[int, str] = field(default_factory=dict)
    """The newest call's id by generation; there are several when a kill hid the first one."""
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    told: set[int] = field(default_factory=set)

    @property
    def identity(self) -> str:
        """Hash of code, configuration and output directory."""
        return str(self.plan["identity"])

    @property
    def number(self) -> int:
        """Number of the job in its sweep."""
        return int(self.plan["job"])

    @property
    def label(self) -> str:
        """What the user knows it by."""
        return f"job {self.number} [{' '.join(self.plan['overrides'])}]"

    @property
    def call(self) -> str | None:
        """The newest call of the newest generation."""
        return self.calls.get(self.generation)

    @property
    def end(self) -> dict[str, Any] | None:
        """How the newest generation ended; None while it has not."""
        return self.ends.get(self.generation)

    @property
    def status(self) -> str | None:
        """completed, failed or cancelled; None while the newest generation has not ended."""
        return str(self.end["status"]) if self.end else None

    @property
    def unpulled(self) -> str | None:
        """Why the outputs of the newest generation, which has ended, are not here."""
        return (self.end or {}).get("unpulled")

    @property
    def broken(self) -> bool:
        """Whether the newest generation ended without a result."""
        return self.status not in (None, "completed")

    @property
    def key(self) -> str:
        """Names this generation on the Volume and in the Dict."""
        return f"{self.identity}.{self.generation}"

    def event(self, kind: str, **values: Any) -> dict[str, Any]:
        """The journal's line for what has happened to the newest generation."""
        place = {"identity": self.identity, "generation": self.generation}
        return {"event": kind, **place, **values}


class Journal:
    """A sweep's jobs.jsonl."""

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir
        self.folder = sweep_dir / FOLDER
        self.path = self.folder / "jobs.jsonl"
        self.sweep: dict[str, Any] = {}
        self.jobs: dict[str, JobRecord] = {}
        self.replay()

    def replay(self) -> None:
        """Read what is there; a last line cut off by a kill is left out."""
        self.sweep, self.jobs = {}, {}
        for number, line in enumerate(whole_lines(self.path), 1):
            try:
                self.apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LaunchError(
                    f"{self.path}:{number} cannot be read ({error!r}); without that line the job "
                    "that it was of is spawned again"
                ) from None

    def apply(self, event: dict[str, Any]) -> None:
        """Take one line into account."""
        kind = event["event"]
        if kind == "sweep":
            self.sweep = event
            return
        if kind == "plan":
            job = self.jobs.pop(event["identity"], None) or JobRecord(event)
            job.plan = event
            self.jobs[job.identity] = job  # the last one now
            return
        job = self.jobs[event["identity"]]
        if kind == "cancel":
            job.cancelled.add(event["call"])
            return
        generation = int(event["generation"])
        if kind == "told":
            job.told.add(generation)
        elif kind == "spawn":
            job.generation = max(job.generation, generation)
            job.calls[generation] = event["call"]
        elif kind == "end" and (event.get("error") or {}).get("type") != "NotPulled":
            job.ends[generation] = event  # earlier versions took outputs that stay for a failure

    def write(self, events: Iterable[dict[str, Any]]) -> None:
        """Append events and wait until they are on the disk."""
        stamped = [{**event, "at": round(time.time(), 3)} for event in events]
        for event in stamped:
            self.apply(event)
        append_lines(self.path, stamped)

    @contextmanager
    def locked(self, patience: float = 0.0) -> Iterator[None]:
        """Only one process spawns into a sweep at a time; a kill opens the lock.

        Raises:
            LaunchError: another one does, for more than `patience` seconds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience
        with (self.folder / "lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise LaunchError(
                            f"another process is spawning the jobs of {self.sweep_dir}; wait for it"
                        ) from None
                    time.sleep(0.1)
                except OSError:  # a file system without locks: nobody can be seen
                    break
            self.replay()
            yield

    def ordered(self) -> list[JobRecord]:
        """All jobs in the order they were planned."""
        return list(self.jobs.values())

    def current(self) -> list[JobRecord]:
        """Those whose outputs belong into their folders: no other job was planned for it since."""
        newest = {record.plan["subdir"]: record for record in self.ordered()}
        return [record for record in self.ordered() if newest[record.plan["subdir"]] is record]
