"""`app.server`: a reverse proxy without a queue, that answers 503 while no container is ready.

A request with the header `Modal-Session-ID` goes to the container that wins a rendezvous hash over
the ready ones, any other to the one with the least open requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

import aiohttp
from aiohttp import web

from .state import ControlPlane, Fn, Task

MAX_BODY = 1 << 30
HOP_BY_HOP = ("host", "connection", "transfer-encoding", "content-length")
PROBE_SECONDS = 0.3


async def ensure_url(plane: ControlPlane, fn: Fn) -> None:
    """Give a server its address."""
    if fn.url:
        return

    async def handle(request: web.Request) -> web.StreamResponse:
        return await _proxy(plane, fn, request)

    app = web.Application(client_max_size=MAX_BODY)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    plane.runners.append(runner)
    fn.url = f"http://127.0.0.1:{runner.addresses[0][1]}"


def _allowed(fn: Fn, headers: Any) -> bool:
    token = headers.get("Authorization", "")
    return (
        fn.definition.http_config.unauthenticated
        or "Modal-Key" in headers
        or token.startswith("Bearer wk-")
    )


def choose(tasks: list[Task], fn: Fn, session: str | None) -> Task:
    """Choose the container of a request."""
    if session is None:
        return min(tasks, key=lambda task: fn.inflight[task.id])

    def weight(task: Task) -> bytes:
        return hashlib.sha256(f"{session}|{task.id}".encode()).digest()

    return max(tasks, key=weight)


async def _proxy(plane: ControlPlane, fn: Fn, request: web.Request) -> web.StreamResponse:
    from .scheduling import reconcile  # the scheduler imports what starts servers

    if not _allowed(fn, request.headers):
        return web.Response(status=401)
    ready = [t for t in fn.tasks.values() if t.ready and not t.draining and not t.killing]
    if not ready:
        fn.wanted_at = time.time()
        reconcile(plane, fn)
        return web.Response(status=503, text="no ready containers")
    task = choose(ready, fn, request.headers.get("Modal-Session-ID"))
    fn.inflight[task.id] += 1
    reconcile(plane, fn)
    try:
        return await _pass_on(task, request)
    finally:
        fn.inflight[task.id] -= 1
        task.idle_since = time.time()


def _end_to_end(headers: Any) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() not in HOP_BY_HOP}


async def _pass_on(task: Task, request: web.Request) -> web.StreamResponse:
    response: web.StreamResponse | None = None
    if task.http is None:
        connector = aiohttp.UnixConnector(task.http_socket, limit=0)
        task.http = aiohttp.ClientSession(connector=connector, auto_decompress=False)
    try:
        async with task.http.request(
            request.method,
            f"http://container{request.rel_url}",
            headers=_end_to_end(request.headers),
            data=await request.read(),
            allow_redirects=False,
        ) as upstream:
            response = web.StreamResponse(
                status=upstream.status, headers=_end_to_end(upstream.headers)
            )
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response
    except (aiohttp.ClientError, OSError) as error:
        if response is not None and response.prepared:
            raise
        return web.Response(status=502, text=repr(error))


async def await_port(plane: ControlPlane, task: Task) -> None:
    """Mark a container ready once its port answers."""
    while task.id in plane.tasks and not task.ready:
        try:
            reader, writer = await asyncio.open_unix_connection(task.http_socket)
            # The forwarder accepts in any case; it hangs up at once when nothing listens behind.
            try:
                await asyncio.wait_for(reader.read(1), PROBE_SECONDS)
            except TimeoutError:
                task.ready, task.idle_since = True, time.time()
            writer.close()
        except OSError:
            pass
        await asyncio.sleep(0.1)
