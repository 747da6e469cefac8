"""Answers on disk, each exactly once: shards, the journals of unfinished ones, a manifest.

    <folder>/train.plan.safetensors           what goes together; written once
    <folder>/shards/<chunk>.jsonl.open        "<place> <crc32> <result>", in the order they came in
    <folder>/shards/<chunk>.jsonl             a chunk's results in the plan's order, complete
    <folder>/manifest.jsonl                   one line per complete shard: counts, tokens, SHA-256

A place is the index of a result in its chunk. A shard that has no line in the manifest (the
process was killed in between) is counted again; a half-written line is dropped. A result is taken
because it is what was written, not because it is there.
"""

import errno
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from specforge_exp.errors import InputError
from specforge_exp.generation.plan import Plan, load_plan, make_plan, save_plan
from specforge_exp.generation.regenerate import Record
from specforge_exp.records import cut_tail, whole_lines, write_whole

FAILED = b'{"error":'
OPEN_FILES = 256


@dataclass
class Counts:
    """Of results."""

    done: int = 0
    failed: int = 0
    cut: int = 0
    """Those with an answer that ended at max_tokens."""
    tokens: int = 0

    def add(self, other: "Counts") -> None:
        """Sum up."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def take(self, result: Record) -> None:
        """Count one result."""
        if "error" in result:
            self.failed += 1
            return
        self.done += 1
        self.cut += "length" in result["finish_reasons"]
        self.tokens += result["generated_tokens"]


@dataclass
class Chunk:
    """A chunk that is being answered."""

    plan: Plan
    number: int
    name: str
    """As `Plan.name`."""
    size: int
    """Results that it will have."""
    results: dict[int, bytes] = field(default_factory=dict)
    """By place; lines without their end."""
    counts: Counts = field(default_factory=Counts)
    """Of the results."""

    def missing(self) -> list[int]:
        """Places without a result."""
        return [place for place in range(self.size) if place not in self.results]


class Store:
    """The results of one run in one folder.

    Args:
        folder: where; made by the caller.
        sources: the files to regenerate and their SHA-256.
        chunk_size: conversations of a chunk.
        most: of each file, only the first so many.
        samples: results per conversation.
    """

    def __init__(
        self, folder: Path, sources: dict[Path, str], chunk_size: int, most: int | None,
        samples: int,
    ) -> None:  # fmt: skip
        self.folder, self.samples = folder, samples
        self.shards = folder / "shards"
        self.shards.mkdir(exist_ok=True)
        self.plans: list[Plan] = []
        self.files: dict[Path, BinaryIO] = {}
        for source, digest in sources.items():
            self.files[source] = source.open("rb")  # from here on it may be replaced
            saved = folder / f"{source.stem}.plan.safetensors"
            plan = load_plan(saved, source, digest)
            if plan is None:
                plan = make_plan(source, digest, chunk_size, most)
                save_plan(plan, saved)
            self.plans.append(plan)
        self.journals: dict[str, BinaryIO] = {}
        self.counts = Counts()
        self.digests: dict[str, str] = {}
        self.total = self.samples * sum(len(plan.order) for plan in self.plans)
        self.complete = self.read_manifest()
        for journal in self.shards.glob("*.open"):
            if journal.name.partition(".")[0] in self.complete:  # killed before it was removed
                journal.unlink()
            for _, _, result in journal_entries(journal):
                self.counts.take(result)

    def read_manifest(self) -> set[str]:
        """Names of the complete shards; counts those that a kill left out of the manifest."""
        manifest = self.folder / "manifest.jsonl"
        cut_tail(manifest)
        complete = {p.stem for p in self.shards.glob("*.jsonl")}
        entries: dict[str, Counts] = {}
        try:
            for entry in whole_lines(manifest):
                name, digest = entry.pop("shard"), entry.pop("sha256", "")
                entries[name], self.digests[name] = Counts(**entry), digest
        except (InputError, KeyError, TypeError):  # it is made again of the shards
            entries = {}
            manifest.unlink()
        for name in sorted(complete):
            if name not in entries:
                shard = self.shards / f"{name}.jsonl"
                entries[name] = counted(shard)
                self.note(name, entries[name], shard.read_bytes())
            self.counts.add(entries[name])
        return complete

    def note(self, name: str, counts: Counts, content: bytes) -> None:
        """Write a complete shard's line into the manifest."""
        self.digests[name] = hashlib.sha256(content).hexdigest()
        line = {"shard": name, **vars(counts), "sha256": self.digests[name]}
        with (self.folder / "manifest.jsonl").open("ab") as file:
            file.write(orjson.dumps(line) + b"\n")

    def chunks(self) -> Iterator[Chunk]:
        """The chunks that are not complete, with the results that they have already."""
        for plan in self.plans:
            for number in range(len(plan)):
                name = plan.name(number)
                if name in self.complete:
                    continue
                size = len(plan.members(number)) * self.samples
                chunk = Chunk(plan, number, name, size)
                for place, line, result in journal_entries(self.shards / f"{name}.jsonl.open"):
                    chunk.results[place] = line
                    chunk.counts.take(result)
                if chunk.missing():
                    yield chunk
                else:
                    self.finish(chunk)

    def read(self, chunk: Chunk, place: int) -> Record:
        """The conversation of a place, with the id that its result will have; raises BadRecord."""
        file = self.files[chunk.plan.source]
        member = chunk.plan.members(chunk.number)[place // self.samples]
        record = chunk.plan.read(int(member), file)
        if self.samples > 1:
            record["id"] = f"{record['id']}#{place % self.samples}"
        return record

    def add(self, chunk: Chunk, place: int, result: Record) -> None:
        """Keep one result; the last one completes the chunk."""
        if place in chunk.results:
            return
        line = orjson.dumps(result)
        chunk.results[place] = line
        chunk.counts.take(result)
        self.counts.take(result)
        if len(chunk.results) == chunk.size:
            self.finish(chunk)
            return
        if (name := chunk.name) not in self.journals:
            self.journals[name] = (self.shards / f"{name}.jsonl.open").open("ab", buffering=0)
        append(self.journals[name], b"%d %08x %b\n" % (place, zlib.crc32(line, place), line))

    def finish(self, chunk: Chunk) -> None:
        """Write a complete chunk as its shard, whole or not at all."""
        name = chunk.name
        content = b"".join(chunk.results[place] + b"\n" for place in range(chunk.size))
        write_whole(self.shards / f"{name}.jsonl", content)
        if journal := self.journals.pop(name, None):
            journal.close()
        (self.shards / f"{name}.jsonl.open").unlink(missing_ok=True)
        self.complete.add(name)
        self.note(name, chunk.counts, content)
        chunk.results = dict.fromkeys(range(chunk.size), b"")

    def close(self) -> None:
        """Close files."""
        for file in [*self.files.values(), *self.journals.values()]:
            file.close()

    def remove(self) -> None:
        """Delete what only an unfinished run needs, but for the shards: all else is made of them
        again, should the run be killed before the folder has its name."""
        self.close()
        plans = [f"{plan.source.stem}.plan.safetensors" for plan in self.plans]
        for name in (*plans, "manifest.jsonl", "progress.json"):
            (self.folder / name).unlink(missing_ok=True)

    def merge(self, plan: Plan, done: BinaryIO, failed: BinaryIO) -> None:
        """Write the results of one file in its own order; failed conversations apart.

        Raises:
            InputError: a shard is not what was written; names it and the remedy.
        """
        places = np.empty((len(plan.order), 3), np.int64)  # shard, offset, bytes
        shards = [(self.shards / f"{plan.name(n)}.jsonl") for n in range(len(plan))]
        for number, path in enumerate(shards):
            content = path.read_bytes()
            if self.digests[path.stem] not in ("", hashlib.sha256(content).hexdigest()):
                raise damaged(path, ValueError("it was changed after it was written"))
            ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
            ends = ends[self.samples - 1 :: self.samples]
            begins = np.concatenate([[0], ends[:-1]])
            members = plan.members(number)
            places[members] = np.stack([np.full_like(ends, number), begins, ends - begins], 1)
        opened: dict[int, int] = {}
        try:
            for shard, offset, size in places.tolist():
                if shard not in opened:
                    while len(opened) >= OPEN_FILES:
                        os.close(opened.pop(next(iter(opened))))
                    opened[shard] = os.open(shards[shard], os.O_RDONLY)
                for line in os.pread(opened[shard], size, offset).splitlines(True):
                    (failed if line.startswith(FAILED) else done).write(line)
        finally:
            for descriptor in opened.values():
                os.close(descriptor)


def counted(shard: Path) -> Counts:
    """Of a complete shard; InputError, with the remedy, where it is damaged."""
    counts = Counts()
    try:
        for result in whole_lines(shard):
            counts.take(result)
    except (InputError, KeyError, TypeError) as error:
        raise damaged(shard, error) from None
    return counts


def journal_entries(path: Path) -> Iterator[tuple[int, bytes, Record]]:
    """Place, line and result of what an unfinished shard's journal holds.

    Raises:
        InputError: a line before the last is damaged; names file, line and remedy.
    """
    for number, entry in enumerate(cut_tail(path), 1):
        place, _, line = entry.partition(b" ")
        digits = b"" if line.startswith(b"{") else line[:8]  # those of an older version have none
        line = line[len(digits) + bool(digits) :]
        try:
            position, result = int(place), orjson.loads(line)
            Counts().take(result)
            if digits and int(digits, 16) != zlib.crc32(line, position):
                raise ValueError("it was changed after it was written")
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(f"{path}:{number}", error) from None
        yield position, line, result


def damaged(where: Path | str, error: Exception) -> InputError:
    """What to say of results that cannot be read."""
    what = error if isinstance(error, InputError | ValueError) else f"no result ({error!r})"
    return InputError(
        f"{where}: {what}; remove the file: only its conversations are answered again"
    )


def append(file: BinaryIO, content: bytes) -> None:
    """Append to an unbuffered file; what a full disk cuts short is taken back."""
    written = file.write(content)
    if written < len(content):
        os.truncate(file.fileno(), os.fstat(file.fileno()).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
