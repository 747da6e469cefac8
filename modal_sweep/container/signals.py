"""SIGINT (preemption) and SIGUSR1 (cancellation), noted instead of raised while a job runs."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """While entered: remembers which signals came. Outside the main thread: nothing comes."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.earlier: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGUSR1):
                self.earlier[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal."""
        self.seen.add(number)

    @property
    def cancelled(self) -> bool:
        """Whether somebody ended the call."""
        return signal.SIGUSR1 in self.seen

    def raise_again(self) -> None:
        """Raise what Modal's own handlers would have raised."""
        if signal.SIGINT in self.seen:
            raise KeyboardInterrupt
        if self.cancelled:
            from modal.exception import InputCancellation

            raise InputCancellation("Input was cancelled by user")


def send_group(pid: int, number: int) -> None:
    """Signal a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
