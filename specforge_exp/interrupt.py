"""SIGTERM, SIGINT and SIGHUP ask for a checkpoint, or for an end; the signal is raised again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupt:
    """Remembers that the process was asked to end.

    A preempted job must save, and must not look successful: `reraise` restores the handlers that
    were there and sends the signal again.
    """

    def __init__(self) -> None:
        self.number = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's background jobs ignore
                self.before[number] = signal.signal(number, self.remember)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.number = number

    def reraise(self) -> None:
        """Send the remembered signal again, to whoever handled it before; SIGTERM where only
        another process was asked to end."""
        number = self.number or signal.SIGTERM
        signal.signal(number, self.before.get(number, signal.SIG_DFL))
        signal.raise_signal(number)


class Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """SIGTERM ends this block first, and then the process."""
    terminated = False

    def end(number: int, frame: Any) -> None:
        nonlocal terminated
        terminated = True  # also where a `__del__` runs, from which nothing is raised
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Terminated:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    if terminated:
        signal.raise_signal(signal.SIGTERM)
