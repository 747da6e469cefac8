"""What containers print, and the procedures that read it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from modal_proto import api_pb2 as pb

from .rpc import Peer, not_found, streaming, unary
from .state import App, Task

STDOUT, STDERR = pb.FILE_DESCRIPTOR_STDOUT, pb.FILE_DESCRIPTOR_STDERR
SYSTEM = pb.FILE_DESCRIPTOR_INFO


def write_log(app: App, text: str, task: Task | None = None, descriptor: int = SYSTEM) -> None:
    """Append to the log of an app; a line belongs to a call when its container runs only that."""
    running = list(task.running.values()) if task else []
    one = running[0] if len(running) == 1 else None
    batch = pb.TaskLogsBatch(
        task_id=task.id if task else "",
        function_id=task.fn.id if task else "",
        entry_id=str(len(app.logs) + 1),
    )
    batch.items.add(
        data=text,
        timestamp=time.time(),
        timestamp_ns=time.time_ns(),
        file_descriptor=descriptor,
        function_call_id=one.call.id if one else "",
        input_id=one.id if one else "",
    )
    app.logs.append(batch)
    app.logged.fire()


def _matches(request: Any, batch: Any, root: str) -> bool:
    item = batch.items[0]
    wanted = request.parametrized_function_id or request.function_id
    return (
        (not request.function_call_id or item.function_call_id == request.function_call_id)
        and (not request.task_id or batch.task_id == request.task_id)
        and (not wanted or wanted in (batch.function_id, root))
        and request.search_text in item.data
    )


def _root(peer: Peer, batch: Any) -> str:
    fn = peer.plane.fns.get(batch.function_id)
    return fn.base if fn else ""


@streaming("AppGetLogs")
async def _get_logs(peer: Peer, request: Any) -> AsyncIterator[Any]:
    app = peer.plane.apps.get(request.app_id)
    if app is None:
        raise not_found(f"App {request.app_id} not found")
    position, end = int(request.last_entry_id or 0), time.time() + request.timeout
    while True:
        while position < len(app.logs):
            batch = app.logs[position]
            position += 1
            descriptor = request.file_descriptor
            wanted = not descriptor or batch.items[0].file_descriptor == descriptor
            if wanted and _matches(request, batch, _root(peer, batch)):
                yield batch
        if app.done and not any(task.fn.app is app for task in peer.plane.tasks.values()):
            yield pb.TaskLogsBatch(app_done=True)
            return
        left = end - time.time()
        if left <= 0:
            return
        if position == len(app.logs):
            await app.logged.wait(min(left, 0.5))


def _in_range(request: Any, batch: Any) -> bool:
    item = batch.items[0]
    since = request.HasField("since") and item.timestamp_ns < request.since.ToNanoseconds()
    until = request.HasField("until") and item.timestamp_ns > request.until.ToNanoseconds()
    wanted = not request.source or item.file_descriptor == request.source
    return wanted and not since and not until


@unary("AppFetchLogs")
async def _fetch_logs(peer: Peer, request: Any) -> Any:
    app = peer.plane.apps[request.app_id]
    batches = [
        batch
        for batch in app.logs
        if _in_range(request, batch) and _matches(request, batch, _root(peer, batch))
    ]
    return pb.AppFetchLogsResponse(batches=batches[-request.limit :] if request.limit else batches)


@unary("AppCountLogs")
async def _count_logs(peer: Peer, request: Any) -> Any:
    app, width = peer.plane.apps[request.app_id], max(1, request.bucket_secs)
    counts: dict[int, list[int]] = {}
    for batch in app.logs:
        if _in_range(request, batch) and _matches(request, batch, _root(peer, batch)):
            item = batch.items[0]
            start = int(item.timestamp // width) * width
            column = (
                [STDOUT, STDERR].index(item.file_descriptor)
                if (item.file_descriptor in (STDOUT, STDERR))
                else 2
            )
            counts.setdefault(start, [0, 0, 0])[column] += 1
    response = pb.AppCountLogsResponse(app_id=app.id)
    for start, (stdout, stderr, system) in sorted(counts.items()):
        bucket = response.buckets.add(stdout_logs=stdout, stderr_logs=stderr, system_logs=system)
        bucket.bucket_start_at.FromSeconds(start)
    return response
