"""Starts jobs in the container: a process that has imported Hydra and forks for each of them.

A job in a process of its own may end the interpreter, crash or leak without taking the container,
its connection to Modal and its outputs along; a fork costs milliseconds where a fresh interpreter
costs most of a second.
"""

import atexit
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve requests {folder, log} on a socket, one job at a time, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from modal_sweep.container import job

    job.preload()
    control = socket.socket(fileno=descriptor)
    for line in control.makefile("r"):
        request = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            become_job(control, writing)
            leave(job.run(Path(request["folder"])))
        os.close(writing)
        send(control, {"pid": child})
        with open(request["log"], "ab", buffering=0) as log:
            send(control, {"exit": follow(child, reading, log)})
        os.close(reading)


def become_job(control: socket.socket, writing: int) -> None:
    """In the child: a process group of its own, output into the pipe, default signals."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    control.close()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(code: int) -> NoReturn:
    """End the job's process as the interpreter would, without taking every module apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def send(control: socket.socket, message: dict[str, Any]) -> None:
    """One line of JSON."""
    control.sendall(json.dumps(message).encode() + b"\n")


def follow(child: int, reading: int, log: BinaryIO) -> int:
    """Copy the job's output to its log and to ours until it has ended; its exit code."""
    open_pipe = True
    while True:
        if open_pipe and select.select([reading], [], [], 0.2)[0]:
            data = os.read(reading, 65536)
            open_pipe = bool(data)
            log.write(data)
            with contextlib.suppress(OSError):  # the job's own log has it in any case
                os.write(1, data)
            if data:
                continue
        # Children that outlive the job may hold the pipe open: the job's end counts.
        done, status = os.waitpid(child, 0 if not open_pipe else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
