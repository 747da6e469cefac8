"""Output directories: saved to the Volume in the container, brought back here."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from modal_sweep.protocol.records import write_whole

CHUNK = 1 << 20


def files_below(folder: Path, leave_out: Path | None = None) -> Iterator[Path]:
    """Regular files, without those that a cut-off copy left behind and a folder to leave out."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if Path(here, name) != leave_out)
        for name in sorted(names):
            path = Path(here) / name
            if path.is_file() and not name.endswith(".partial"):
                yield path


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(path: Path) -> dict[str, int]:
    """Size and modification time of a file."""
    stat = path.stat()
    return {"size": stat.st_size, "time": stat.st_mtime_ns}


def save(
    source: Path, target: Path, earlier: dict[str, Any], leave_out: Path | None = None
) -> dict[str, Any]:
    """Copy what changed below `source` into `target`.

    Args:
        earlier: what the last call returned; {} at first. Files of a `snapshot` count as copied.
        leave_out: a folder below `source`.

    Returns:
        By relative path: size, modification time and, of what was copied, sha256 of every file.
    """
    manifest = {}
    for path in files_below(source, leave_out):
        name = path.relative_to(source).as_posix()
        with contextlib.suppress(FileNotFoundError):  # a temporary file of the job
            state, entry = state_of(path), earlier.get(name, {})
            if not state.items() <= entry.items():
                copy(path, target / name)
                entry = {**state, "sha256": file_digest(target / name)}
            manifest[name] = entry
    for name in earlier.keys() - manifest.keys():
        (target / name).unlink(missing_ok=True)
    return manifest


def copy(source: Path, target: Path) -> None:
    """Copy a file so that it is whole or not there."""
    with source.open("rb") as file:
        write_whole(target, iter(lambda: file.read(CHUNK), b""), durable=False)


def restore(saved: Path, folder: Path) -> None:
    """Bring a preempted attempt's files back into the container."""
    for path in files_below(saved):
        target = folder / path.relative_to(saved)
        if not target.exists():
            copy(path, target)


def snapshot(folder: Path) -> dict[str, dict[str, int]]:
    """Size and modification time of every file below a folder."""
    return {path.relative_to(folder).as_posix(): state_of(path) for path in files_below(folder)}


def safe_target(folder: Path, name: str) -> Path:
    """Where a file of a manifest goes; raises ValueError for a name that leaves the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise ValueError(f"{name!r} does not lie below {folder}")
    return folder / pure


def pull(
    manifest: dict[str, Any],
    folder: Path,
    read: Callable[[str], Iterable[bytes]],
) -> int:
    """Fetch the files of a manifest that are not here yet.

    Args:
        manifest: relative path -> {size, sha256}.
        read: content of a file on the Volume, by relative path.

    Returns:
        Number of files fetched.

    Raises:
        OSError: when a file that came is not the one in the manifest.
    """
    fetched = 0
    for name, entry in manifest.items():
        target = safe_target(folder, name)
        here = target.is_file() and target.stat().st_size == entry["size"]
        if not (here and file_digest(target) == entry["sha256"]):
            write_whole(target, read(name), durable=False)
            if file_digest(target) != entry["sha256"]:
                target.unlink()
                raise OSError(f"{target} came back damaged; run the command again")
            fetched += 1
    return fetched
