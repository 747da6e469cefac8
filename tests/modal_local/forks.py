"""Containers that are forks of a process which has imported what they import.

That process is the caller's (option `forks` is its socket). An order says `spec`, a file for
`isolation.begin`, `words`, what the main process runs as Python would, and its environment `env`;
with it go standard input, output and errors. The answer is the process that stands where `unshare`
does otherwise, or 0 when a fork would not be the same as a start; later comes its exit status.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from typing import Any

from .orders import give


@dataclass(eq=False)
class Forked:
    """A process that was forked, not by this one; what is used of asyncio's `Process`."""

    pid: int
    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader
    returncode: int | None = None
    ended: asyncio.Task[int] | None = None

    async def wait(self) -> int:
        """Return its exit status, negative for a signal."""
        assert self.ended is not None
        return await asyncio.shield(self.ended)

    async def follow(self, answers: asyncio.StreamReader, connection: asyncio.StreamWriter) -> int:
        """Note how it ends; 255 when nobody can say."""
        self.returncode = int(await answers.readline() or b"255")
        connection.close()
        self.stdin.close()
        return self.returncode


async def start(path: str, order: dict[str, Any], limit: int) -> Forked | None:
    """Order a container; None when it has to start cold. `limit`: bytes of a line of output."""
    files = [number for _ in range(3) for number in os.pipe()]
    theirs, ours = [files[0], files[3], files[5]], [files[1], files[2], files[4]]
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        give(connection, {**order, "cwd": "/", "session": True}, theirs)
    finally:
        for number in theirs:
            os.close(number)
    answers, writer = await asyncio.open_unix_connection(sock=connection)
    pid = int(await answers.readline())
    if not pid:
        writer.close()
        for number in ours:
            os.close(number)
        return None
    stdin = await _writer(ours[0])
    forked = Forked(pid, stdin, await _reader(ours[1], limit), await _reader(ours[2], limit))
    forked.ended = asyncio.get_running_loop().create_task(forked.follow(answers, writer))
    return forked


async def _writer(file: int) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, os.fdopen(file, "wb", 0)
    )
    return asyncio.StreamWriter(transport, protocol, None, loop)


async def _reader(file: int, limit: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(file, "rb", 0)
    )
    return reader
