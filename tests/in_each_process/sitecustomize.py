"""Python runs this first in every process that has this folder on PYTHONPATH: see holding.py.

It looks at what Python tells of files: a training opens its metrics for every line, a regeneration
the journal of every chunk; a block of preprocess gets its name when it is whole.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

journals: set[Path] = set()
"""Of chunks, opened so far."""


def place(event: str, arguments: tuple[Any, ...]) -> tuple[Path, int] | None:
    """The folder that is written to, and how far that is: its last logged step, the chunks that
    were begun before, the blocks that are there. None: something else happens."""
    if event == "open" and arguments[1] in ("a", "ab") and not isinstance(arguments[0], int):
        path = Path(os.fsdecode(arguments[0]))
        if path.name == "metrics.jsonl":
            lines = path.read_text().splitlines()
            return path.parent, int(json.loads(lines[-1])["step"]) if lines else 0
        if path.name.endswith(".jsonl.open"):
            journals.add(path)
            return path.parent.parent, len(journals) - 1
    if event == "os.rename":
        path = Path(os.fsdecode(arguments[1]))
        if path.parent.name == "blocks":
            return path.parent.parent, len([*path.parent.glob("*.safetensors")])
    return None


def held(folder: Path, done: int) -> bool:
    """Whether the test's file is there, and as much was done as it says."""
    place = Path(os.environ.get("HOLD_FOLDER", folder.parent))  # a container sees others
    try:
        return done >= int((place / f"{folder.name}.hold").read_text())
    except FileNotFoundError:
        return False


def wait(folder: Path, done: int) -> None:
    """Until it is held no more, or a signal came that the process listens to."""
    came: list[int] = []
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def heard(number: int, frame: Any) -> None:
        came.append(number)
        handlers[signal.Signals(number)](number, frame)  # type: ignore[operator, misc]

    listened = [number for number, handler in handlers.items() if callable(handler)]
    for number in listened:
        signal.signal(number, heard)
    try:
        while not came and held(folder, done):
            time.sleep(0.01)
    finally:
        for number in listened:
            signal.signal(number, handlers[number])


def told(event: str, arguments: tuple[Any, ...]) -> None:
    """What Python calls for everything that it does with the system."""
    if event in ("open", "os.rename"):
        with suppress(FileNotFoundError):  # metrics that do not exist yet
            found = place(event, arguments)
            if found and held(*found):
                wait(*found)


sys.addaudithook(told)
