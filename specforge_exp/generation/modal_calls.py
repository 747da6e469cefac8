"""Calls on Modal as they are seen from here: written down, looked at, their ends told apart."""

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import orjson

from specforge_exp.errors import InputError
from specforge_exp.generation.store import whole_lines

T = TypeVar("T")
OUTAGE = 900.0
"""Seconds without an answer of Modal after which a run is given up."""


class Gone(Exception):
    """The result of a call has expired, or the call was cancelled."""


class Died(Exception):
    """The container died of a call, or the call took longer than Modal allows."""


class Raised(Exception):
    """Our own code has raised in the container; the message is its."""


class Unreachable(Exception):
    """Modal does not answer at the moment."""


class Journal:
    """calls.jsonl: which call answers which part; a line is on the disk before the next call.

    {"chunk": ..., "part": ..., "places": [...], "call": "fc-..."}   a call was spawned
    {"part": ..., "left": [...], "why": ...}    it ended and left these places unanswered
    {"part": ..., "seconds": ...}               of a container, for the account of the cost
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: dict[str, str] = {}
        """The newest call of each part."""
        self.first: dict[str, list[int]] = {}
        """By chunk, the places of its first part."""
        self.left: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        for line in whole_lines(path):
            self.take(orjson.loads(line))

    def take(self, said: dict[str, Any]) -> None:
        """Take one line into account."""
        if "call" in said:
            self.calls[said["part"]] = said["call"]
            self.first.setdefault(said["chunk"], said["places"])
        elif "left" in said:
            self.left[said["part"]] = said
        else:
            self.seconds[said["part"]] = said["seconds"]

    def write(self, said: dict[str, Any]) -> None:
        """Append a line and wait until it is on the disk."""
        self.take(said)
        with self.path.open("ab", buffering=0) as file:
            file.write(orjson.dumps(said) + b"\n")
            os.fsync(file.fileno())


async def result_of(call: str) -> bytes | None:
    """What a call has returned; None while it runs.

    Raises:
        Gone, Died, Raised, Unreachable: see there.
    """
    import modal
    from modal import exception

    try:
        found: bytes = await modal.FunctionCall.from_id(call).get.aio(timeout=0)
        return found
    except (exception.OutputExpiredError, exception.NotFoundError) as error:
        raise Gone(str(error)) from None
    except (exception.FunctionTimeoutError, exception.InternalFailure) as error:
        raise Died(str(error)) from None
    except (exception.ConnectionError, exception.ServiceError, exception.InternalError) as error:
        raise Unreachable(str(error)) from None
    except exception.RemoteError as error:
        raise Gone(str(error) or "cancelled") from None
    except exception.AuthError as error:
        raise InputError(f"Modal: {error}") from None
    except TimeoutError:
        return None
    except OSError as error:
        raise Unreachable(str(error)) from None
    except exception.InputCancellation:
        raise Gone("cancelled") from None
    except Exception as error:
        raise Raised(str(error) if isinstance(error, InputError) else repr(error)) from None


class Outage:
    """How long Modal has not answered."""

    def __init__(self) -> None:
        self.since: float | None = None

    def over(self) -> None:
        """It has answered."""
        self.since = None

    def lasts(self, error: Exception) -> None:
        """It has not; raises InputError when that has been so for too long."""
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        if now - self.since > OUTAGE:
            raise InputError(
                f"Modal has not answered for {OUTAGE / 60:.0f} minutes ({error}); the calls go on, "
                "and the same command brings their results"
            )


async def patiently(step: Callable[[], Awaitable[T]], outage: Outage) -> T:
    """Do a step again while Modal cannot be reached."""
    import asyncio

    from modal import exception

    while True:
        try:
            done = await step()
            outage.over()
            return done
        except (
            exception.ConnectionError, exception.ServiceError, exception.InternalError, OSError
        ) as error:  # fmt: skip
            outage.lasts(error)
        await asyncio.sleep(2.0)
