"""Records on disk: files that appear whole, and JSON lines whose last one may be cut.

What says "complete" reaches the disk before its name does: `replacing` writes
`<name>.<pid>.partial`, syncs it, renames it and syncs the folder. A killed writer of JSON lines
leaves half a line at the end at most; `whole_lines` takes it for not written yet. Half a line
anywhere else is damage.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from specforge_exp.errors import InputError, naming


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # not every network file system can sync a folder
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk: a rename may overtake what it names.

    Whoever may read the folder may read its files: safetensors makes them for their owner alone.
    """
    readers = folder.stat().st_mode & 0o044
    for path in folder.rglob("*"):
        mode = path.stat().st_mode
        if path.is_file() and readers & ~mode:
            path.chmod(mode | readers)
        sync(path)
    sync(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; when the block ends well that file becomes `path`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never half of it."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`write_whole` of a JSON object; what JSON does not know becomes text."""
    write_whole(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_record(path: Path, content: dict[str, Any]) -> None:
    """`write_json` of an object with its own digest as `sha256`, which `unsealed` compares."""
    plain = json.loads(json.dumps(content, default=str))
    write_json(path, {**plain, "sha256": seal(plain)})


def seal(content: dict[str, Any]) -> str:
    """Digest of an object of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def unsealed(record: Any) -> dict[str, Any]:
    """A record without its digest; ValueError when it is not what was written.

    One of an older version has no digest and is taken as it is.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object was expected")
    content = {key: value for key, value in record.items() if key != "sha256"}
    if record.get("sha256") not in (None, seal(content)):
        raise ValueError("it was changed after it was written")
    return content


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, without a cut last line; none where there is no file.

    Raises:
        InputError: another line is no JSON object; names file and line.
    """
    if not path.exists():
        return
    with naming(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = parse(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise InputError(f"{path}:{number}: {error}") from None
            yield record


def digest_of(arrays: dict[str, NDArray[Any]], *more: bytes) -> str:
    """SHA-256 of arrays, by name, and of what else belongs to them."""
    digest = hashlib.sha256(b"".join(more))
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def metric_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl, as `whole_lines`: objects of numbers with an integer `step`.

    Raises:
        InputError: one is something else; names file, line and remedy.
    """
    try:
        for number, line in enumerate(whole_lines(path), 1):
            plain = all(isinstance(value, int | float | None) for value in line.values())
            if not (plain and isinstance(line.get("step"), int)):
                raise InputError(f"{path}:{number}: no object of numbers with a step")
            yield line
    except InputError as error:
        remedy = "remove that line, or train again with trainer.resume=false"
        raise InputError(f"{error}; {remedy}") from None


def parse(line: bytes) -> dict[str, Any]:
    """One JSON object; ValueError for anything else."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:  # NaN and Infinity, which Python writes
        record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object was expected")
    return record


def cut_tail(path: Path) -> list[bytes]:
    """The whole lines of a file that will be appended to; a half-written last one is cut off."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return whole.splitlines()
