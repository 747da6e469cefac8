"""Run a command and end everything that it has started when the standard input closes.

    python -I -S supervise.py COMMAND...

It stands between a server and whoever starts it: the other end of the input closes even when that
process is killed. Standard library only, so it starts in milliseconds.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""


def main() -> int:
    """Exit status of the command, once nothing of it is left."""
    prctl = getattr(ctypes.CDLL(None), "prctl", lambda *arguments: None)
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # whoever loses its parent becomes a child of this process
    child = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509 - one thread
    )  # fmt: skip
    threading.Thread(target=end_with_input, args=(child,), daemon=True).start()
    code = child.wait()
    end_group(child, signal.SIGKILL)
    end_orphans()
    return code if code >= 0 else 128 - code


def end_with_input(child: "subprocess.Popen[bytes]") -> None:
    """Wait for the end of the input, then end the command."""
    os.read(0, 1)
    end_group(child, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    end_group(child, signal.SIGKILL)


def end_group(child: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Signal the command's process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def end_orphans() -> None:
    """Kill what has left the group; each one's children come here in turn."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    while listed.exists() and (children := listed.read_text().split()):
        for pid in map(int, children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(main())
