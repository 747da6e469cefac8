"""What other work on the machine does not move: instructions, counted by valgrind's callgrind."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any


def callgrind(output: Path) -> list[str]:
    """What a command begins with for a callgrind to run it that counts nothing yet."""
    return [
        "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={output}",
    ]  # fmt: skip


def instructions(step: Callable[[], Any], output: Path) -> int:
    """Of one step of this process, which `callgrind` runs.

    Args:
        step: what is counted.
        output: as `callgrind` was given it.

    Raises:
        subprocess.CalledProcessError: no callgrind runs this process.
    """

    def control(*words: str) -> None:
        command = ["callgrind_control", *words, str(os.getpid())]
        subprocess.run(command, check=True, capture_output=True)

    control("-i", "on")
    step()
    control("-i", "off")
    control("-d")
    dumps = sorted(output.parent.glob(f"{output.name}.*"), key=lambda path: path.stat().st_mtime)
    totals = [line for line in dumps[-1].read_text().splitlines() if line.startswith("totals:")]
    return int(totals[0].split()[1])
