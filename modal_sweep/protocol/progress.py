"""A job's progress file: JSON lines that it appends to while it runs."""

import json
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST = 50


def place(name: str, output_dir: Path) -> Path:
    """Where it lies below the output directory; one from elsewhere is copied there."""
    path = output_dir / name
    return path.relative_to(output_dir) if path.is_relative_to(output_dir) else Path(path.name)


def touched(path: Path) -> tuple[int, ...] | None:
    """What another file of the name, or more in it, changes; None where there is none."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


class Tail:
    """What was appended since the last look: the newest line, and what certain lines report."""

    def __init__(
        self, path: Path, keys: Sequence[str], most: int | None = MOST, strange: bool = False
    ) -> None:
        """`strange`: what is there now may be another run's; it counts when it changes."""
        self.path, self.keys = path, list(keys)
        self.untouched = touched(path) if strange else None
        self.last: dict[str, Any] = {}
        self.reports: deque[dict[str, Any]] = deque(maxlen=most)
        """The step and the keys of every line that has one of the keys."""
        self.inode, self.at = 0, 0

    @property
    def is_strange(self) -> bool:
        """Whether the file is as it was when this began, and may be another run's."""
        return self.untouched is not None and self.untouched == touched(self.path)

    def look(self) -> "Tail":
        """Read on; a file that was written anew is read from its beginning."""
        if self.is_strange:
            return self
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self.inode or stat.st_size < self.at:
                    self.inode, self.at = stat.st_ino, 0
                    self.reports.clear()
                file.seek(self.at)
                data = file.read()
        except OSError:
            return self
        whole = data[: data.rfind(b"\n") + 1]
        self.at += len(whole)
        for line in whole.splitlines():
            self.take(line)
        return self

    def take(self, line: bytes) -> None:
        """Take one line into account; what is no JSON object says nothing."""
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not isinstance(entry, dict):
            return
        self.last = entry
        if any(key in entry for key in self.keys):
            self.reports.append({key: entry[key] for key in ("step", *self.keys) if key in entry})
