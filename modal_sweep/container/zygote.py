"""Starts jobs in the container: a process that has imported Hydra and forks for each of them.

A job in a process of its own may end the interpreter, crash or leak without taking the container,
its connection to Modal and its outputs along; a fork costs milliseconds where a fresh interpreter
costs most of a second.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import BinaryIO

PR_SET_PDEATHSIG = 1
# The process that forks jobs and our end of its connection: one per container.
zygotes: list[tuple[subprocess.Popen[bytes], Connection]] = []


def start() -> Connection:
    """Our end of the connection to the process that forks jobs, started once per container."""
    if not zygotes or zygotes[-1][0].poll() is not None:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "modal_sweep.container.zygote", str(theirs.fileno())]
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            # The sources are in /root.
            env={
                **os.environ,
                "PYTHONPATH": os.environ.get("PYTHONPATH") or "/root",
                "PYTHONUNBUFFERED": "1",
            },
        )
        theirs.close()
        zygotes.append((process, ours))
    return zygotes[-1][1]


def answer(control: Connection) -> int:
    """Its next answer; raises RuntimeError when it has ended."""
    try:
        number: int = control.recv()
    except (EOFError, OSError):
        raise RuntimeError("the process that starts jobs has ended") from None
    return number


def main(descriptor: int) -> None:
    """Serve requests, one job at a time, until the connection is closed.

    The answers are the job's process id when it starts and its exit code when it has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    from modal_sweep.container import job

    job.preload()
    control = Connection(descriptor)
    while True:
        try:
            request = control.recv()
        except EOFError:
            return
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            become_job(writing)
            control.close()
            job.run(request)
            sys.exit()
        os.close(writing)
        control.send(child)
        with open(request.log, "ab", buffering=0) as log:
            control.send(follow(child, reading, log))
        os.close(reading)


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def become_job(writing: int) -> None:
    """In the child: a process group of its own, output into the pipe, default signals."""
    os.setpgid(0, 0)
    end_with_parent()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
        ended, status = os.waitpid(child, 0 if not open_pipe else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
