"""Waiting out times in which Modal does not answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from modal_sweep.errors import Unreachable

T = TypeVar("T")


def transient() -> tuple[type[Exception], ...]:
    """What is raised while Modal does not answer."""
    from modal import exception

    return Unreachable, exception.ConnectionError, exception.ServiceError, exception.InternalError


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
        """It has not; raises what `too_long` makes of the error when that was so for too long."""
        now = time.monotonic()
        if self.since is None:
            self.since = now
            self.note(f"Modal does not answer, trying again: {error}")
        elif now - self.since > self.limit:
            raise self.too_long(error) from None


def patiently(step: Callable[[], T], outage: Outage, also: tuple[type[Exception], ...] = ()) -> T:
    """Do a step again while Modal does not answer, or raises one of `also`."""
    pause = 0.5
    while True:
        try:
            answer = step()
        except (*transient(), *also) as error:
            outage.lasts(error)
        else:
            outage.over()
            return answer
        time.sleep(pause)
        pause = min(10.0, 2 * pause)
