"""Files that are whole or not there, JSON lines whose last one a kill may have cut, first lines."""

import fcntl
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

STILL = 60.0
"""Seconds without a write after which a file is written by nobody, if its process is not of this
machine."""


def write_whole(path: Path, content: Iterable[bytes], durable: bool = True) -> None:
    """Write a file so that it is whole or not there, with the folders above it.

    Args:
        content: its parts.
        durable: also after the machine itself has stopped; False for what can be brought again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    forget_dead(path)
    # A name of its own: the launching process and `attach` may bring the same file at once.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def forget_dead(path: Path) -> None:
    """Remove what killed processes have left of a file that they were writing."""
    for left in path.parent.glob(f"{escape(path.name)}.*.partial"):
        with suppress(OSError, OverflowError, ValueError):  # another has its number, or it is gone
            try:
                os.kill(int(left.name.split(".")[-2]), 0)
            except ProcessLookupError:
                if time.time() - left.stat().st_mtime > STILL:
                    left.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # not every network file system can sync a folder
        os.fsync(descriptor)
    os.close(descriptor)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is there, without their ends; a cut last one is left out."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1].splitlines()


def append_lines(path: Path, entries: Iterable[Any]) -> None:
    """Append lines of JSON and wait until they are on the disk; a cut last line goes."""
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry, separators=(",", ":")).encode() + b"\n" for entry in entries]
    with path.open("a+b", buffering=0) as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # what another process is writing is not cut
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read(size).rfind(b"\n") + 1)
        file.write(b"".join(lines))
        os.fsync(file.fileno())
    if fresh:
        sync_folder(path.parent)


def first_line(error: BaseException | str) -> str:
    """The start of an error's text; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__ if isinstance(error, BaseException) else ""
