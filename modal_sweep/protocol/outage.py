"""Waiting out times in which Modal does not answer.

Only what is about a connection is waited out: no space, no right, a name that is too long are no
better a minute later, here or there.
"""

import errno
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from modal_sweep.errors import Unreachable

T = TypeVar("T")
# A connection that is not there, or that this process has no descriptor or memory for just now.
NO_LINK = "ENETDOWN ENETUNREACH ENETRESET EHOSTDOWN EHOSTUNREACH EADDRNOTAVAIL ENOTCONN"
AWAY = {getattr(errno, name) for name in f"{NO_LINK} ENOBUFS ENOMEM EMFILE ENFILE".split()}


def away(error: BaseException) -> bool:
    """Whether an exception says that Modal does not answer at the moment."""
    from modal import exception

    if isinstance(error, OSError):
        connection = ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError
        return isinstance(error, connection) or error.errno in AWAY
    kinds = Unreachable, exception.ConnectionError, exception.ServiceError, exception.InternalError
    return isinstance(error, kinds)


@dataclass
class Outage:
    """How long Modal has not answered."""

    limit: float
    """Seconds after which it is given up."""
    too_long: Callable[[Exception], Exception] = lambda error: error
    """What is raised then, by the last error."""
    note: Callable[[str], None] = lambda text: None
    """Is told that it begins and ends."""
    since: float | None = None

    def over(self) -> None:
        """Modal has answered."""
        if self.since is not None:
            self.since = None
            self.note("Modal answers again")

    def lasts(self, error: Exception) -> None:
        """It has not; raises what `too_long` makes of the error when that was so for too long, and
        an error that says something else."""
        if not away(error):
            raise error
        now = time.monotonic()
        if self.since is None:
            self.since = now
            self.note(f"Modal does not answer, trying again: {error}")
        elif now - self.since > self.limit:
            raise self.too_long(error) from None


def patiently(step: Callable[[], T], outage: Outage) -> T:
    """Do a step again while Modal does not answer."""
    pause = 0.5
    while True:
        try:
            answer = step()
        except Exception as error:
            outage.lasts(error)
        else:
            outage.over()
            return answer
        time.sleep(pause)
        pause = min(10.0, 2 * pause)
