"""The worker's side of Modal: claim, status, common part, commits; outages are waited out."""

import contextlib
import glob
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import modal
from modal.exception import Error

from modal_sweep.protocol import outage
from modal_sweep.protocol.names import COMMON_DICT, status_dict

T = TypeVar("T")
OUTAGE = 600.0  # seconds without the control plane before a step is given up


class CommitFailed(OSError):
    """A Volume did not take what was written to it."""


def patiently(step: Callable[[], T]) -> T:
    """Do a step again while the control plane cannot be reached."""
    return outage.patiently(step, outage.Outage(OUTAGE))


@cache
def common_part(digest: str) -> bytes:
    """What all jobs of the sweep share, fetched once per container."""
    shared = modal.Dict.from_name(COMMON_DICT)
    content: bytes | None = patiently(lambda: shared.get(digest))
    if content is None:
        raise RuntimeError(
            f"the sweep's common part {digest[:12]} is gone; run the same command again"
        )
    return content


class Cloud:
    """What one attempt at a job says to Modal."""

    def __init__(self, reference: dict[str, Any]) -> None:
        self.reference = reference
        self.claims = modal.Dict.from_name(reference["dict"])
        self.running = modal.Dict.from_name(status_dict(reference["dict"]))
        self.attempt = 1
        self.reported: dict[str, Any] = {}
        self.checkpoints = self.find_checkpoints()
        names = {reference["volume"], *reference["mounts"].values()}
        self.volumes = {name: modal.Volume.from_name(name) for name in sorted(names)}

    def claim(self) -> str | None:
        """Make this call the owner of the job; the owner's call id when it is another one.

        A call that was preempted finds its own claim and goes on, as the next attempt.
        """
        own = modal.current_function_call_id()
        key = self.reference["key"]
        if patiently(lambda: self.claims.put(key, own, skip_if_exists=True)):
            return None
        owner = str(patiently(lambda: self.claims.get(key)))
        if owner != own:
            return owner
        earlier = patiently(lambda: self.running.get(key)) or {}
        self.attempt = int(earlier.get("attempt", 1)) + 1
        return None

    def status(self, **state: Any) -> None:
        """Tell the launcher, when there is something new; never fails a job."""
        entry = {**state, "attempt": self.attempt}
        if entry != self.reported:
            with contextlib.suppress(Error, OSError):
                self.running.put(self.reference["key"], entry)
                self.reported = entry

    def over(self) -> None:
        """Take the job out of those that run: only they are read while a sweep is watched."""
        if self.reported:
            with contextlib.suppress(Error, OSError, KeyError):
                self.running.pop(self.reference["key"])

    def reload(self) -> None:
        """See what an earlier attempt committed."""
        for volume in self.volumes.values():
            with contextlib.suppress(Error, RuntimeError):
                patiently(volume.reload)

    def find_checkpoints(self) -> set[str]:
        """What matches the job's `checkpoints`."""
        return set(glob.glob(self.reference["checkpoints"] or ""))

    def new_checkpoint(self) -> bool:
        """Whether a checkpoint has appeared since the last time."""
        earlier, self.checkpoints = self.checkpoints, self.find_checkpoints()
        return bool(self.checkpoints - earlier)

    def commit(self) -> None:
        """Commit every mounted Volume.

        Raises:
            CommitFailed: when a Volume refuses, for example because it is full.
        """
        for name, volume in self.volumes.items():
            try:
                patiently(volume.commit)
            except (Error, OSError, RuntimeError) as error:
                # The commit itself is done then; seeing what others wrote can wait.
                if "open files" in str(error):
                    continue
                raise CommitFailed(f"Volume {name}: {error}") from None
