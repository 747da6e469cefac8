"""End what a cluster of Ray has left, and remove its folder, when the standard input closes.

    python -I -S leftovers.py FOLDER

It watches over the process that started the cluster: the other end of its input closes when that
process has ended the cluster, and also when it is killed. Some of Ray's processes would live on
then: its agents, which are told by the log files that they hold open. Standard library only, so it
starts in milliseconds.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

ATTEMPTS = 200
"""Looks, 0.05 s apart: those that are killed still write for a moment."""


def main() -> int:
    """Exit status: 0 when nothing is left."""
    folder, starter = Path(sys.argv[1]), os.getppid()
    os.read(0, 1)
    for _ in range(ATTEMPTS):
        left = [pid for pid in users(folder) if pid not in (os.getpid(), starter)]
        for pid in left:
            with suppress(OSError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        if not left and not folder.exists():
            return 0
        time.sleep(0.05)
    return 1


def users(folder: Path) -> list[int]:
    """Processes that name the folder on their command line, or hold a file of it open."""
    name, pids = str(folder), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
            words = (process / "cmdline").read_bytes()
            if name.encode() in words or any(file.startswith(f"{name}/") for file in files):
                pids.append(int(process.name))
    return pids


if __name__ == "__main__":
    sys.exit(main())
