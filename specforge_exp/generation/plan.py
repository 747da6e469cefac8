"""What is regenerated in which order: conversations with the same beginning go together.

Prefixes are compared by hashes of the first 128, 512, 2048 and 8192 characters, so a plan of a
million conversations takes tens of megabytes, is made in one reading, and is loaded afterwards
without looking at the conversations again.
"""

import hashlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specforge_exp.data.conversations import BadRecord, normalise
from specforge_exp.records import digest_of, replacing

LEVELS = (128, 512, 2048, 8192)
CHUNK_BYTES = 8 * 2**20
Record = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Where the conversations of one file lie, and how they are dealt out."""

    source: Path
    digest: str
    """SHA-256 of the source."""
    total: int
    """Conversations in the source; those after the planned ones are skipped."""
    starts: np.ndarray
    """Byte at which each planned conversation begins."""
    lengths: np.ndarray
    """Its bytes."""
    lines: np.ndarray
    """Its line number in the source."""
    twice: np.ndarray
    """Those whose id an earlier one has."""
    order: np.ndarray
    """The conversations in the order in which they are dealt out."""
    chunks: np.ndarray
    """Chunk c is order[chunks[c]:chunks[c + 1]]."""

    def __len__(self) -> int:
        return len(self.chunks) - 1

    def members(self, chunk: int) -> np.ndarray:
        """The conversations of a chunk, in order."""
        return self.order[self.chunks[chunk] : self.chunks[chunk + 1]]

    def name(self, chunk: int) -> str:
        """The chunk's name: its split, its number, and a hash of what it is made of."""
        made_of = self.digest.encode() + self.members(chunk).tobytes()
        digest = hashlib.blake2b(made_of, digest_size=4).hexdigest()
        return f"{self.source.stem}-{chunk:06d}-{digest}"

    def read(self, number: int, file: BinaryIO) -> Record:
        """One conversation, by its number in the source.

        Raises:
            BadRecord: it is no conversation, or its id has been there before; the message names
                file and line.
        """
        where = f"{self.source.name}:{self.lines[number]}"
        file.seek(int(self.starts[number]))
        try:
            record = normalise(orjson.loads(file.read(int(self.lengths[number]))))
        except (BadRecord, orjson.JSONDecodeError) as error:
            raise BadRecord(f"{where}: {error}") from None
        record.pop("error", None)  # what the data calls so; in a result it means that this failed
        if number in self.twice:
            raise BadRecord(f"{where}: an earlier line has the id {record['id']}")
        return record


def make_plan(source: Path, digest: str, chunk_size: int, most: int | None) -> Plan:
    """Read a file of conversations once and deal it into chunks.

    Args:
        source: JSON lines.
        digest: its SHA-256.
        chunk_size: conversations of a chunk, at most; it also ends at CHUNK_BYTES.
        most: leave out what comes after so many conversations; null: nothing.
    """
    starts, lengths, lines, twice = (array("q") for _ in range(4))
    hashes = array("q")  # one for each of LEVELS, again and again
    ids: set[int] = set()
    total = end = 0
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if line.isspace():
                continue
            total += 1
            if most is not None and total > most:
                continue
            try:
                record = orjson.loads(line)
                named, text = record.get("id"), beginning(record)
                name = hash(line if named is None else str(named))  # without: by what it says
            except (ValueError, AttributeError, TypeError, KeyError):
                name, text = hash((start,)), f"not a conversation: {start}"
            if name in ids:
                twice.append(len(starts))
            ids.add(name)
            starts.append(start)
            lengths.append(len(line))
            lines.append(number)
            hashes.extend(hash(text[:level]) for level in LEVELS)
    by_level = np.frombuffer(hashes, np.int64).reshape(-1, len(LEVELS)).T
    ranks = [first_with(level_hashes) for level_hashes in by_level]
    order = np.lexsort(ranks[::-1]).astype(np.int32)
    integers = starts, lengths, lines, twice
    arrays: list[np.ndarray] = [np.frombuffer(numbers, np.int64) for numbers in integers]
    arrays += [order, cut(ranks[0][order], arrays[1][order], chunk_size)]
    return Plan(source, digest, total, *arrays)


def beginning(record: Record) -> str:
    """What the target reads before its first answer, as text: tools, then messages."""
    parts = [str(record["tools"])] if record.get("tools") else []
    for message in record.get("conversations") or record["messages"]:
        role = message.get("role") or message["from"]
        if role in ("assistant", "gpt"):
            break
        parts.append(f"{role}\n{message.get('content', message.get('value'))}")
    return "\x1e".join(parts)


def first_with(hashes: np.ndarray) -> np.ndarray:
    """For each entry the index of the first equal one."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int32)


def cut(groups: np.ndarray, sizes: np.ndarray, chunk_size: int) -> np.ndarray:
    """Boundaries of chunks: a group is kept whole where it fits, at most half a chunk is wasted."""
    boundaries = [0]
    changes = np.flatnonzero(np.diff(groups)) + 1
    ends = dict(zip([0, *changes.tolist()], [*changes.tolist(), len(groups)], strict=True))
    chunk_bytes = 0
    for index, size in enumerate(sizes.tolist()):
        count = index - boundaries[-1]
        room = chunk_size - count
        overflows = index in ends and ends[index] - index > room and 2 * count >= chunk_size
        if count and (not room or chunk_bytes + size > CHUNK_BYTES or overflows):
            boundaries.append(index)
            chunk_bytes = 0
        chunk_bytes += size
    return np.array([*boundaries, len(groups)] if len(groups) else [0], np.int64)


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan so that a reader sees all of it or nothing."""
    arrays = {name: value for name, value in vars(plan).items() if isinstance(value, np.ndarray)}
    about = {"digest": plan.digest, "total": str(plan.total), "sha256": digest_of(arrays)}
    with replacing(path) as partial:
        save_file(arrays, partial, about)


def load_plan(path: Path, source: Path, digest: str) -> Plan | None:
    """The plan that `save_plan` wrote for this source; None where it is not what was written: it
    is made again of the source then."""
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if (about.get("digest"), about.get("sha256")) != (digest, digest_of(arrays)):
        return None
    try:
        return Plan(source, digest, int(about["total"]), **arrays)
    except (KeyError, TypeError, ValueError):
        return None
