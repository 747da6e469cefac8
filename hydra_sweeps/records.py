"""Files that survive a kill, digests of files, and errors in one line."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

WHOLE, BLOCKS, BLOCK = 2**26, 16, 2**16
"""Of a file with more bytes so many blocks of so many bytes count, evenly spread."""


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: after a kill or a power cut it has the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    with suppress(OSError):  # not every network file system can sync a folder
        os.fsync(folder)  # so that the new name lasts
    os.close(folder)


@dataclass
class Tail:
    """The lines that are added to a file of JSON lines."""

    path: Path | None
    strange: bool = False
    """What the file holds now may be another run's: it does not count until it changes."""
    offset: int = 0
    inode: int = 0
    untouched: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.strange and self.path is not None:
            with suppress(OSError):
                self.untouched = touched(self.path.stat())

    def whole_lines(self) -> list[dict[str, Any]]:
        """Whole lines since the last call; a line that is no JSON object is left out."""
        try:
            if self.path is None:
                return []
            with self.path.open("rb") as file:
                state = os.fstat(file.fileno())
                if touched(state) == self.untouched:
                    return []
                if state.st_ino != self.inode or state.st_size < self.offset:  # it was written anew
                    self.inode, self.offset = state.st_ino, 0
                file.seek(self.offset)
                raw = file.read()
        except OSError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        self.offset += len(whole)
        records = []
        for line in whole.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return [record for record in records if isinstance(record, dict)]


def touched(state: os.stat_result) -> tuple[int, ...]:
    """What another file of the name, or more in it, changes."""
    return state.st_ino, state.st_size, state.st_mtime_ns


def digests(path: Path) -> Iterator[str]:
    """Of a file, or of a folder's files but for hidden ones; nothing where there is neither."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            stat = file.stat()
            yield content_digest(file.absolute(), stat.st_size, stat.st_mtime_ns)


@cache
def content_digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file of this size, written at this time; of a large one, of `BLOCKS` of it."""
    with file.open("rb") as content:
        if size <= WHOLE:
            return hashlib.file_digest(content, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(BLOCKS):
            content.seek((size - BLOCK) * number // (BLOCKS - 1))
            digest.update(content.read(BLOCK))
        return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().partition("\n")[0]


def reason(error: BaseException) -> str:
    """An error in one line; with its type, where that tells something."""
    line, kind = first_line(error).removeprefix("error: "), type(error).__name__
    if not line:
        return kind
    return (line if isinstance(error, HydraException) else f"{kind}: {line}")[:500]
