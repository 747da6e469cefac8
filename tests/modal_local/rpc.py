"""How remote procedures are registered, served, and made to fail on request."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpclib.server
from google.protobuf import empty_pb2  # type: ignore[import-untyped]
from grpclib import GRPCError, Status
from modal_proto import api_grpc

from .state import ControlPlane, Task

Empty: Any = empty_pb2.Empty
REMEMBERED = 4096
# A client repeats a request whose answer was lost; these would act twice.
ONCE = {"FunctionMap", "FunctionPutInputs", "DictUpdate", "DictPop", "QueuePut", "QueueGet"}


@dataclass
class Peer:
    """Who calls. Requests of containers carry no task id: each container has its own socket."""

    plane: ControlPlane
    task: Task | None

    def container(self) -> Task:
        """Return the calling container."""
        if self.task is None:
            raise GRPCError(Status.FAILED_PRECONDITION, "only a container may call this")
        return self.task


Unary = Callable[[Peer, Any], Awaitable[Any]]
Streaming = Callable[[Peer, Any], AsyncIterator[Any]]
_unary: dict[str, Unary] = {}
_streaming: dict[str, Streaming] = {}
_undelivered: dict[str, Callable[[Peer, Any], None]] = {}


def unary(name: str) -> Callable[[Unary], Unary]:
    """Register a function as the procedure `name`."""

    def register(function: Unary) -> Unary:
        _unary[name] = function
        return function

    return register


def streaming(name: str) -> Callable[[Streaming], Streaming]:
    """Register an async generator as the procedure `name`."""

    def register(function: Streaming) -> Streaming:
        _streaming[name] = function
        return function

    return register


def undelivered(name: str, function: Callable[[Peer, Any], None]) -> None:
    """Register what takes back an answer of `name` that did not reach its client."""
    _undelivered[name] = function


def not_found(message: str) -> GRPCError:
    """Return the error for an object that does not exist."""
    return GRPCError(Status.NOT_FOUND, message)


async def _inject(plane: ControlPlane, name: str) -> None:
    for fault in list(plane.faults):
        if fault.rpc not in ("", name):
            continue
        fault.count -= 1
        if fault.count <= 0:
            plane.faults.remove(fault)
        if fault.status is not None:
            raise GRPCError(fault.status, f"modal_local: injected failure of {name}")
        await asyncio.sleep(fault.seconds)


async def _answer(peer: Peer, name: str, function: Unary, stream: Any) -> None:
    plane = peer.plane
    plane.rpcs[name] += 1
    request = await stream.recv_message()
    if plane.faults:
        await _inject(plane, name)
    key = None
    if name in ONCE:
        key = (name, str(stream.metadata.get("x-idempotency-key", "")))
    if key is not None and key[1] and key in plane.answered:
        response = plane.answered[key]
    else:
        response = await function(peer, request)
        if key is not None and key[1]:
            plane.answered[key] = response
            while len(plane.answered) > REMEMBERED:
                plane.answered.popitem(last=False)
    try:
        await stream.send_message(response)
    except BaseException:
        if name in _undelivered:
            _undelivered[name](peer, response)
        raise


async def _answer_all(peer: Peer, name: str, function: Streaming, stream: Any) -> None:
    peer.plane.rpcs[name] += 1
    request = await stream.recv_message()
    if peer.plane.faults:
        await _inject(peer.plane, name)
    async for message in function(peer, request):
        await stream.send_message(message)


def _method(name: str) -> Callable[[Any, Any], Awaitable[None]]:
    if name in _unary:
        one = _unary[name]

        async def method(self: Any, stream: Any) -> None:
            await _answer(self.peer, name, one, stream)

    elif name in _streaming:
        many = _streaming[name]

        async def method(self: Any, stream: Any) -> None:
            await _answer_all(self.peer, name, many, stream)

    else:

        async def method(self: Any, stream: Any) -> None:
            self.peer.plane.unimplemented[name] += 1
            await stream.recv_message()
            raise GRPCError(Status.UNIMPLEMENTED, f"modal_local does not implement {name}")

    return method


def servicer(plane: ControlPlane, task: Task | None) -> Any:
    """Return a service of all procedures for one peer; those not registered are counted."""
    instance = _servicer_class()()
    instance.peer = Peer(plane, task)
    return instance


@functools.cache
def _servicer_class() -> Any:
    base: Any = api_grpc.ModalClientBase
    names = sorted(base.__abstractmethods__)
    unknown = (_unary.keys() | _streaming.keys()) - set(names)
    if unknown:
        raise RuntimeError(f"the installed modal wheel has no procedures {sorted(unknown)}")
    return type("Servicer", (base,), {name: _method(name) for name in names})


class _Server(grpclib.server.Server):
    """A server that can hang up on everyone."""

    def __init__(self, handlers: list[Any]) -> None:
        super().__init__(handlers)
        self.protocols: set[Any] = set()

    def _protocol_factory(self) -> Any:
        self.protocols = {p for p in self.protocols if not _closed(p)}
        protocol = super()._protocol_factory()
        self.protocols.add(protocol)
        return protocol


def _closed(protocol: Any) -> bool:
    connection = getattr(protocol, "connection", None)
    transport = getattr(connection, "_transport", None)
    return connection is not None and (transport is None or transport.is_closing())


class Listener:
    """One gRPC socket, TCP (`port`) or Unix (`path`), that can go down and come back."""

    def __init__(self, handler: Any, *, port: int = 0, path: str = "") -> None:
        self.handler, self.port, self.path = handler, port, path
        self.server: _Server | None = None

    async def start(self) -> None:
        """Listen; a second start uses the port of the first."""
        server = _Server([self.handler])
        if self.path:
            await server.start(path=self.path)
        else:
            await server.start("127.0.0.1", self.port)
            inner: Any = server._server
            self.port = inner.sockets[0].getsockname()[1]
        self.server = server

    def stop(self) -> None:
        """Close the socket and drop every connection."""
        if self.server is None:
            return
        inner: Any = self.server._server
        inner.close()
        for protocol in self.server.protocols:
            if not _closed(protocol) and hasattr(protocol, "connection"):
                protocol.connection._transport.abort()
        self.server = None
        if self.path:
            Path(self.path).unlink(missing_ok=True)


async def go_down(plane: ControlPlane, seconds: float) -> None:
    """Refuse all connections for a while, then serve on the same sockets with all state kept."""
    plane.down_until = time.time() + seconds
    listeners = [plane.listener, *(task.listener for task in plane.tasks.values())]
    live = [listener for listener in listeners if listener is not None]
    for listener in live:
        listener.stop()
    await asyncio.sleep(seconds)
    plane.down_until = 0.0
    gone = {id(task.listener) for task in plane.tasks.values()} | {id(plane.listener)}
    for listener in live:
        if id(listener) in gone and listener.server is None and not plane.stopping:
            await listener.start()
