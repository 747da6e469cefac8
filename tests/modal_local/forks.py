"""Containers that start as forks of a process that has imported what they import: `warm`."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import warm

MAX_LINE = 1 << 20


@dataclass
class Fork:
    """What is used of `asyncio.subprocess.Process`, of a fork."""

    started: warm.Started
    stdin: asyncio.WriteTransport
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader

    @property
    def pid(self) -> int:
        """Of who waits for process 1; it leads a process group."""
        return self.started.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, once it was waited for."""
        return self.started.returncode

    async def wait(self) -> int:
        """Return the exit status when it has ended."""
        return await asyncio.to_thread(self.started.wait)


async def start(kind: str, spec: dict[str, Any], environment: dict[str, str]) -> Fork:
    """Start a container as a fork of a process of this kind."""
    order = {
        "words": spec["argv"][1:], "cwd": "/", "env": environment, "session": True, "spares": 1,
        "container": spec,
    }  # fmt: skip
    (given, write), (read, output), (read_errors, errors) = (os.pipe() for _ in range(3))
    with open(given) as theirs, open(output, "w") as printed, open(errors, "w") as complained:
        started = await asyncio.to_thread(warm.Started, kind, order, theirs, [printed, complained])
    pipe = os.fdopen(write, "wb", 0)
    stdin, _ = await asyncio.get_running_loop().connect_write_pipe(asyncio.BaseProtocol, pipe)
    return Fork(started, stdin, await _reader(read), await _reader(read_errors))


async def _reader(descriptor: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=MAX_LINE)
    protocol = asyncio.StreamReaderProtocol(reader)
    pipe = os.fdopen(descriptor, "rb", 0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
    return reader
