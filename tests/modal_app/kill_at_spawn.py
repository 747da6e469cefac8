"""Run a Hydra script and kill it at its k-th spawn: before or after the line in jobs.jsonl.

python kill_at_spawn.py K before|after SCRIPT [ARGUMENTS]
"""

import os
import runpy
import signal
import sys
from collections.abc import Iterable
from typing import Any

from modal_sweep.protocol import journal


def main() -> None:
    at, when = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[3:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    write = journal.Journal.write
    spawned = 0

    def write_or_die(self: journal.Journal, events: Iterable[dict[str, Any]]) -> None:
        nonlocal spawned
        listed = list(events)
        spawned += sum(event["event"] == "spawn" for event in listed)
        last = spawned == at and listed[0]["event"] == "spawn"
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, listed)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal.write = write_or_die  # type: ignore[method-assign]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
