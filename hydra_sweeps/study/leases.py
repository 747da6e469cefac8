"""Which process runs a trial, where several processes work on one study.

The law: a RUNNING trial of a live process is never taken over, that of a dead one is. A process
writes a lease into its trials and renews it. On its own machine a process that is gone is seen at
once; of another machine a lease has ended when it has not changed for `ENDED` seconds of the clock
here, for clocks of two machines differ. Who finds that a trial is no longer its own lets go of it.
"""

import os
import socket
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

LEASE = "hydra.lease"
"""Attribute of a trial: whose it is; {}: nobody's. Also of a study: who fills its queue."""
RENEWED = 30.0
"""Seconds between two signs of life."""
ENDED = 180.0
"""Seconds without one after which a process of another machine counts as gone."""
SETTLED = 2.0
"""Seconds after which two processes that want the same thing see who wrote last: many times what a
write takes that waits for others."""


@dataclass
class Leases:
    """What this process knows of the others."""

    alone: bool
    """Nobody else can have the study: its storage lies in the sweep's own folder, which is
    locked."""
    folder: str
    """Where this process's runs write."""
    signs: int = 0
    renewed: float = 0.0
    seen: dict[int, tuple[Any, float, bool]] = field(default_factory=dict)
    """By trial: its lease, since when, and whether it has changed before our eyes."""

    @property
    def holder(self) -> dict[str, Any]:
        """This process."""
        pid = os.getpid()
        return {"host": machine(), "pid": pid, "born": born(pid), "folder": self.folder}

    def write(self, trial: Any) -> None:
        """Sign a trial, or the study."""
        trial.set_user_attr(LEASE, {**self.holder, "sign": self.signs})

    def due(self) -> bool:
        """Whether it is time for a sign of life; counts it."""
        if self.alone or time.monotonic() - self.renewed < RENEWED:
            return False
        self.signs, self.renewed = self.signs + 1, time.monotonic()
        return True

    def is_own(self, signed: Any) -> bool:
        """Whether a trial, or a study, is this process's."""
        lease = signed.user_attrs.get(LEASE) or {}
        return self.holder.items() <= lease.items()

    def state(self, trial: Any) -> str:
        """Of a RUNNING trial that is not run here: live, gone, or unclear until it shows."""
        lease = trial.user_attrs.get(LEASE)
        if self.alone or lease == {}:
            return "gone"
        if lease and lease["host"] == machine():
            return "live" if born(lease["pid"]) == lease["born"] else "gone"
        now = time.monotonic()
        before, since, changed = self.seen.get(trial.number, (lease, now, False))
        if lease != before:
            since, changed = now, True
        self.seen[trial.number] = (lease, since, changed)
        return "gone" if now - since > ENDED else "live" if changed else "unclear"


@cache
def machine() -> str:
    """This machine, this start of it, and what of its processes can be seen from here."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # not Linux
        pass
    return " ".join(parts)


def born(pid: int) -> str:
    """When a process of this machine began; "" when it is gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    except OSError:
        pass
    try:  # where there is no /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "" if Path("/proc/self/stat").exists() else "alive"
