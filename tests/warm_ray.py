"""Ray's workers as forks of one process for each cluster.

That process is a child of the script which starts Ray, so that who looks below the script finds
them, and it ends with the script. It imports Ray with the first order, in whose environment the
script has told Ray what it reads when it is imported; torch and transformers it has from its
parent. Ray starts a worker by a program (`warm_programs.RAYS`) that stands in the fork's place: it
hands on signals and the exit status, and a fork whose program is killed is killed. Ray's agents and
monitors start cold: they read other variables when they import Ray, and look at their parent.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from modal_local.orders import receive
from warm_spares import DEATH_SIGNAL, take

NAME = "WARM_RAY"
"""Environment variable: the abstract socket of the process that forks."""


def keep_ray(python: str) -> dict[str, Any] | None:
    """Fork the process that forks, of which the environment tells the program `python` then, which
    is this process's Python from now on; in its forks, what each is to be."""
    name = f"warm-ray-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{name}")
    listener.listen(64)
    os.environ[NAME] = name
    parent = os.getpid()
    if os.fork():
        listener.close()
        sys.executable = python
        return None
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    return serve(listener)


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for every order; returns in forks only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends: dict[int, tuple[int, socket.socket]] = {}
    """Of forks, by a file that is readable when one has ended: its pid, and its program."""
    while True:
        programs = {connection: pid for pid, connection in ends.values()}
        ready, _, _ = select.select([listener, *programs, *ends], [], [])
        for connection in ready:
            if connection in programs:  # the program says no more: it is gone
                with suppress(ProcessLookupError):
                    os.kill(programs[connection], signal.SIGKILL)
        for end in ready:
            if end in ends:
                pid, connection = ends.pop(end)
                os.close(end)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with connection, suppress(OSError):
                    connection.sendall(b"%d\n" % code)
        if listener in ready:
            connection, _ = listener.accept()
            order, files = receive(connection)
            if not order:
                continue
            if pid := fork(order):
                connection.sendall(b"%d\n" % pid)
                ends[os.pidfd_open(pid)] = pid, connection
                for file in files:
                    os.close(file)
                continue
            for end, (_, other) in ends.items():
                os.close(end)
                other.close()
            listener.close()
            take(files, order["files"])
            return order


def fork(order: dict[str, Any]) -> int:
    """As os.fork, from a process that has imported Ray; a fork dies as its program would have."""
    os.environ.update(order["env"])
    importlib.import_module("ray._private.worker")
    pid = os.fork()
    if not pid:
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, order["death"])
        if order["session"]:
            os.setsid()
    return pid
