"""Spare children of a process of `warm`: each waits to be asked, and is then a process that its
parent starts as Python (`warm_programs.SPARED`)."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from modal_local.orders import receive

DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG: a signal for who outlives what forked it."""
FORK_SERVER = "forkserver"
"""The kernel's name of such a process and of what it forks."""


def keep_fork_servers(python: str, count: int) -> dict[str, Any] | None:
    """Fork children that may become multiprocessing's fork servers; as `keep_spare`."""
    names = [f"warm-{os.getpid()}-{number}" for number in range(count)]
    os.environ["WARM_SPARES"] = " ".join(names)
    for name in names:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{name}")
        listener.listen()
        if order := keep_spare(listener):
            return order
    multiprocessing.set_executable(python)
    return None


def keep_spare(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a child that ends with this process unless it is asked for: in there, what it is to be.

    Only the child holds the listener then, so who asks one that is gone is refused.
    """
    if os.fork():
        listener.close()
        return None
    prctl = ctypes.CDLL(None).prctl
    prctl(DEATH_SIGNAL, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, _ = listener.accept()
    order, files = receive(connection)
    if not order:
        os._exit(1)
    prctl(DEATH_SIGNAL, 0)
    if order["session"]:
        os.setsid()
    if order["words"][0] == "-c":
        Path("/proc/self/comm").write_text(FORK_SERVER)
    with suppress(OSError):
        connection.sendall(b"%d" % os.getpid())
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, 512) for file in files]
    os.closerange(0, 512)
    for file, number in zip(above, order["files"], strict=True):
        os.dup2(file, number)
    os.closerange(512, 1024)
    return order
