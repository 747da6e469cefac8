"""What containers ask for: inputs, outputs, heartbeats."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from modal_proto import api_pb2 as pb

from .rpc import Empty, Peer, unary, undelivered
from .scheduling import complete, give_back, take
from .servers import await_port
from .state import Task

POLL_SECONDS = 20.0  # below the idle limits of the channel
TURNS = 4  # of the event loop, until a line that has arrived in a pipe is in the log


@unary("ContainerHello")
async def _hello(peer: Peer, request: Any) -> Any:
    return Empty()


def _stopping(task: Task) -> bool:
    return task.draining or task.killing or task.fn.app.done


@unary("FunctionGetInputs")
async def _get_inputs(peer: Peer, request: Any) -> Any:
    plane, task = peer.plane, peer.container()
    fn, count = task.fn, max(1, request.batch_max_size)
    if fn.concurrency == 1:
        # It asks for the next input only after the output of the last: this one got lost.
        for item in list(task.running.values()):
            give_back(plane, task, item)
    if not task.ready:  # what its class does on entering is done
        task.ready, task.idle_since = True, time.time()
    end = time.time() + POLL_SECONDS
    while not fn.queue and not _stopping(task):
        left = end - time.time()
        if left <= 0:
            return pb.FunctionGetInputsResponse()
        await fn.arrived.wait(left)
    if _stopping(task):
        fn.arrived.fire(1)  # the wake-up may have been for an input that another can take
        return pb.FunctionGetInputsResponse(inputs=[pb.FunctionGetInputsItem(kill_switch=True)])
    if len(fn.queue) < count:
        await asyncio.sleep(request.batch_linger_ms / 1000)
    response = pb.FunctionGetInputsResponse()
    for item in take(plane, task, count):
        response.inputs.add(
            input_id=item.id,
            input=item.message,
            function_call_id=item.call.id,
            retry_count=item.attempt,
            function_map_idx=item.index,
            function_call_invocation_type=item.call.invocation,
        )
    return response


def _return_inputs(peer: Peer, response: Any) -> None:
    for message in response.inputs:
        item = peer.plane.inputs.get(message.input_id)
        if item is not None:
            give_back(peer.plane, peer.container(), item)


undelivered("FunctionGetInputs", _return_inputs)


@unary("FunctionPutOutputs")
async def _put_outputs(peer: Peer, request: Any) -> Any:
    task = peer.container()
    for _ in range(TURNS):  # what it printed before is read first, so that it belongs to this input
        await asyncio.sleep(0)
    for output in request.outputs:
        item = peer.plane.inputs.get(output.input_id)
        # A repeated or late output, of an attempt that was given up, counts for nothing.
        if item is None or item.done or item.task is not task or output.retry_count != item.attempt:
            continue
        complete(peer.plane, item, output.result, task, output.data_format)
    return Empty()


@unary("FunctionGetDynamicConcurrency")
async def _concurrency(peer: Peer, request: Any) -> Any:
    return pb.FunctionGetDynamicConcurrencyResponse(concurrency=request.max_concurrency)


@unary("ContainerHeartbeat")
async def _heartbeat(peer: Peer, request: Any) -> Any:
    """Hold the answer until there is a cancellation to carry, or nearly the next heartbeat."""
    task = peer.container()
    if not task.cancelled:
        await task.cancellation.wait(peer.plane.options.heartbeat * 0.9)
    ids, task.cancelled = task.cancelled, []
    if not ids:
        return pb.ContainerHeartbeatResponse()
    return pb.ContainerHeartbeatResponse(cancel_input_event=pb.CancelInputEvent(input_ids=ids))


def _return_cancellations(peer: Peer, response: Any) -> None:
    peer.container().cancelled += response.cancel_input_event.input_ids


undelivered("ContainerHeartbeat", _return_cancellations)


@unary("TaskResult")
async def _task_result(peer: Peer, request: Any) -> Any:
    """Fail what waits: the container failed outside an input (import error, `@enter` raised)."""
    task = peer.container()
    task.init_error = True
    waiting = [*task.running.values(), *task.fn.queue]
    task.fn.queue.clear()
    for item in waiting:
        complete(peer.plane, item, request.result, task)
    return Empty()


@unary("ContainerServerLifecycleReady")
async def _server_ready(peer: Peer, request: Any) -> Any:
    peer.plane.spawn(await_port(peer.plane, peer.container()))
    return Empty()


@unary("ContainerStop")
async def _stop(peer: Peer, request: Any) -> Any:
    task = peer.plane.tasks.get(request.task_id)
    if task is not None:
        task.draining = True
        task.fn.arrived.fire()
    return pb.ContainerStopResponse()


@unary("TaskList")
async def _task_list(peer: Peer, request: Any) -> Any:
    tasks = [
        pb.TaskStats(
            task_id=task.id,
            app_id=task.fn.app.id,
            app_description=task.fn.app.name,
            started_at=task.enqueued,
            enqueued_at=task.enqueued,
        )
        for task in peer.plane.tasks.values()
        if not request.app_id or task.fn.app.id == request.app_id
    ]
    return pb.TaskListResponse(tasks=tasks)
