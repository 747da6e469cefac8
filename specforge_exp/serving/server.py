"""A server as a process of its own: started, watched until it is healthy, ended with all it has."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from specforge_exp.errors import InputError

SUPERVISE = Path(__file__).with_name("supervise.py")
GRACE = 15.0
"""Seconds for a server to end, before it is killed together with its supervisor."""
READ = 2**24
"""Bytes of one line of a stream, at most: SGLang repeats the whole answer with every token."""
TAIL = 20
"""Lines of its log that an error shows."""

HERE = ("localhost", "::1", "0.0.0.0")
"""Names of this machine, besides 127.*."""


def connections(timeout: float, key: str | None) -> aiohttp.ClientSession:
    """Connections to servers; `timeout` in seconds for one answer."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=aiohttp.ClientTimeout(total=timeout, connect=30.0),
        read_bufsize=READ,
    )


def proxy_of(url: str) -> str | None:
    """The proxy by which HTTP_PROXY or HTTPS_PROXY have a server asked, unless NO_PROXY names it;
    this machine itself is asked without.

    Raises:
        InputError: the proxy speaks no HTTP.
    """
    place = urlsplit(url)
    host, port = place.hostname or "", f":{place.port}" if place.port else ""
    proxy = getproxies().get(place.scheme, "")
    if not proxy or host in HERE or host.startswith("127.") or proxy_bypass(host + port):
        return None
    scheme, found, _ = proxy.partition("://")
    if found and scheme not in ("http", "https"):
        raise InputError(
            f"{url}: {place.scheme}_proxy begins with {scheme}://, not http:// or https://; "
            f"no_proxy={host} asks without it"
        )
    return proxy if found else f"http://{proxy}"


class Server:
    """A command that serves HTTP on this machine, in a process group of its own.

    It ends with this process, however that ends.

    Args:
        command: the program and its arguments.
        port: where it listens, on 127.0.0.1; it answers GET /health once it can work.
        log: the file that gets what it prints.
        environment: added to this process's.
    """

    def __init__(
        self, command: list[str], port: int, log: Path, environment: dict[str, str]
    ) -> None:
        self.command, self.port, self.log, self.environment = command, port, log, environment
        self.url = f"http://127.0.0.1:{port}"
        self.process: asyncio.subprocess.Process | None = None
        self.ended: asyncio.Task[int] | None = None
        """Done as soon as it has ended."""

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self.ended is not None and not self.ended.done()

    async def start(self, timeout: float) -> None:
        """Start it and return when it is healthy.

        Args:
            timeout: seconds that it may take.

        Raises:
            InputError: the port is taken, it ends, or it is not healthy in time; with the end of
                its log.
        """
        await self.check_port()
        supervised = [sys.executable, "-I", "-S", str(SUPERVISE), *self.command]
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *supervised, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip
        self.ended = asyncio.create_task(self.process.wait())
        deadline = time.monotonic() + timeout
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10.0)) as session:
            while not await self.healthy(session):
                if self.ended.done():
                    raise self.problem(f"ended (exit code {self.ended.result()})")
                if time.monotonic() > deadline:
                    await self.stop()
                    raise self.problem(f"was not healthy within engine.startup_timeout={timeout:g}")
                await asyncio.wait({self.ended}, timeout=0.2)

    async def check_port(self) -> None:
        """Raise InputError when somebody else listens there: it would be taken for the server."""
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.close()
            raise InputError(
                f"port {self.port} is taken by another program; choose a free one with engine.port"
            )

    async def healthy(self, session: aiohttp.ClientSession) -> bool:
        """Whether it answers."""
        try:
            async with session.get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    def problem(self, what: str) -> InputError:
        """Why it did not start, with the end of its log."""
        return InputError(f"the server `{' '.join(self.command)}` {what}; {self.tail()}")

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL:]
        return "\n  ".join([f"the end of {self.log}:", *lines])

    async def stop(self) -> None:
        """End it and everything that it has started."""
        if self.process is None or self.ended is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        done, _ = await asyncio.wait({self.ended}, timeout=GRACE)
        if not done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.ended
