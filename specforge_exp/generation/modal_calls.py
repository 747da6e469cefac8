"""Calls of engine=modal: written down, looked at, waited for while Modal is away."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import modal

from modal_sweep.client.calls import call_error
from modal_sweep.protocol.outage import Outage
from modal_sweep.protocol.records import append_lines
from specforge_exp.errors import InputError
from specforge_exp.records import whole_lines

T = TypeVar("T")
OUTAGE = 900.0
"""Seconds without an answer of Modal after which a run is given up."""


class Journal:
    """calls.jsonl: which call answers which part; a line is on the disk before the next call.

    {"chunk": ..., "part": ..., "places": [...], "call": "fc-..."}   a call was spawned
    {"part": ..., "left": [...], "why": ...}    it ended and left these places unanswered
    {"part": ..., "seconds": ...}               of a container, for the account of the cost

    The first one also has the `run`: results that another one has left on the Volume are not taken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: dict[str, str] = {}
        """The newest call of each part."""
        self.first: dict[str, list[int]] = {}
        """By chunk, the places of its first part."""
        self.left: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.run = "" if path.exists() else secrets.token_hex(8)
        number = 0
        try:
            for entry in whole_lines(path):
                number += 1
                self.take(entry)
        except (InputError, KeyError, TypeError) as error:
            what = f"{path}:{number}: no call" if isinstance(error, LookupError) else error
            raise InputError(f"{what}; remove that line: what it was of is asked again") from None

    def take(self, entry: dict[str, Any]) -> None:
        """Take one line into account."""
        self.run = entry.get("run", self.run)
        if "call" in entry:
            self.calls[entry["part"]] = entry["call"]
            self.first.setdefault(entry["chunk"], entry["places"])
        elif "left" in entry:
            self.left[entry["part"]] = entry
        else:
            self.seconds[entry["part"]] = entry["seconds"]

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line and wait until it is on the disk."""
        if not self.path.exists():
            entry = {"run": self.run, **entry}
        self.take(entry)
        append_lines(self.path, [entry])


async def result_of(call: str) -> bytes | None:
    """What a call has returned; None while it runs.

    Raises:
        CallError, Unreachable: as modal_sweep tells them apart.
    """
    try:
        packed: bytes = await modal.FunctionCall.from_id(call).get.aio(timeout=0)
        return packed
    except (Exception, modal.exception.InputCancellation) as error:
        if problem := call_error(error):
            raise problem from None
        return None


def new_outage() -> Outage:
    """Ends the run when Modal has not answered for 15 minutes."""
    return Outage(
        OUTAGE,
        lambda error: InputError(
            f"Modal has not answered for {OUTAGE / 60:.0f} minutes ({error}); the calls go on, "
            "and the same command brings their results"
        ),
    )


async def patiently(step: Callable[[], Awaitable[T]], outage: Outage) -> T:
    """Do a step again while Modal cannot be reached."""
    while True:
        try:
            answer = await step()
        except Exception as error:
            outage.lasts(error)
        else:
            outage.over()
            return answer
        await asyncio.sleep(2.0)
