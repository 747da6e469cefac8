"""Calls, as the client sees them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from .functions import known_function
from .rpc import Empty, Peer, not_found, streaming, unary
from .scheduling import cancel, reconcile
from .state import (
    FAILURE,
    INTERNAL,
    SUCCESS,
    TERMINATED,
    TIMEOUT,
    Call,
    ControlPlane,
    Input,
    new_id,
)

BATCH = 100  # outputs in one answer
STREAM_SECONDS = 50.0


def known_call(plane: ControlPlane, identity: str) -> Call:
    """Return a call by id."""
    call = plane.calls.get(identity)
    if call is None:
        raise not_found(f"Function call {identity} not found")
    return call


def _put(plane: ControlPlane, call: Call, items: Iterable[Any]) -> list[Any]:
    fn, answers, items = call.fn, [], list(items)
    limit = plane.options.max_pending_spawn
    asynchronous = call.invocation == pb.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
    if asynchronous and len(fn.queue) + len(items) > limit:
        raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many pending inputs")
    for message in items:
        item = Input(new_id("in"), message.idx, call, fn, message.input)
        call.inputs[item.index] = plane.inputs[item.id] = item
        fn.queue.append(item)
        answers.append(
            pb.FunctionPutInputsResponseItem(idx=item.index, input_id=item.id, input_jwt=item.id)
        )
    call.unfinished += len(items)
    fn.arrived.fire(len(items))
    reconcile(plane, fn)
    return answers


@unary("FunctionMap")
async def _map(peer: Peer, request: Any) -> Any:
    plane, fn = peer.plane, known_function(peer.plane, request.function_id)
    if fn.app.done:
        raise not_found("The app this function belongs to has stopped")
    kind, invocation = request.function_call_type, request.function_call_invocation_type
    call = Call(new_id("fc"), fn, kind, invocation, request.parent_input_id)
    plane.calls[call.id] = call
    return pb.FunctionMapResponse(
        function_call_id=call.id,
        pipelined_inputs=_put(plane, call, request.pipelined_inputs),
        function_call_jwt=call.id,
        retry_policy=fn.definition.retry_policy,
        sync_client_retries_enabled=False,  # keeps all retries here
        max_inputs_outstanding=plane.options.max_map_outstanding,
    )


@unary("FunctionPutInputs")
async def _put_inputs(peer: Peer, request: Any) -> Any:
    call = known_call(peer.plane, request.function_call_id)
    return pb.FunctionPutInputsResponse(inputs=_put(peer.plane, call, request.inputs))


@unary("FunctionFinishInputs")
async def _finish_inputs(peer: Peer, request: Any) -> Any:
    return Empty()


def _ready(call: Call, request: Any, position: int) -> list[Any]:
    if request.HasField("start_idx"):
        last = request.end_idx if request.HasField("end_idx") else request.start_idx
        indices: Iterable[int] = range(request.start_idx, last + 1)
    else:
        indices = call.order[position : position + BATCH]
    return [call.outputs[index] for index in indices if index in call.outputs]


@unary("FunctionGetOutputs")
async def _get_outputs(peer: Peer, request: Any) -> Any:
    """Answer when there are outputs; none with nothing unfinished means they expired."""
    call = known_call(peer.plane, request.function_call_id)
    position, end = int(request.last_entry_id.split("-")[0] or 0), time.time() + request.timeout
    outputs = _ready(call, request, position)
    while not outputs and not call.expired and (left := end - time.time()) > 0:
        await call.finished.wait(left)
        outputs = _ready(call, request, position)
    indexed = request.HasField("start_idx")
    return pb.FunctionGetOutputsResponse(
        outputs=outputs,
        idxs=[output.idx for output in outputs],
        last_entry_id=request.last_entry_id if indexed else f"{position + len(outputs)}-0",
        num_unfinished_inputs=call.unfinished,
    )


@unary("FunctionCallFromId")
async def _from_id(peer: Peer, request: Any) -> Any:
    call = known_call(peer.plane, request.function_call_id)
    metadata = pb.FunctionCallHandleMetadata(app_id=call.fn.app.id, function_id=call.fn.id)
    return pb.FunctionCallFromIdResponse(
        function_call_id=call.id, num_inputs=len(call.inputs), metadata=metadata
    )


def _info(call: Call) -> Any:
    def count(*statuses: int) -> Any:
        total = sum(output.result.status in statuses for output in call.outputs.values())
        return pb.InputCategoryInfo(total=total)

    return pb.FunctionCallInfo(
        function_call_id=call.id,
        created_at=call.created,
        total_inputs=len(call.inputs),
        pending_inputs=pb.InputCategoryInfo(total=call.unfinished),
        succeeded_inputs=count(SUCCESS),
        failed_inputs=count(FAILURE, INTERNAL),
        timeout_inputs=count(TIMEOUT),
        cancelled_inputs=count(TERMINATED),
    )


@unary("FunctionCallGetInfo")
async def _get_info(peer: Peer, request: Any) -> Any:
    return pb.FunctionCallGetInfoResponse(
        info=_info(known_call(peer.plane, request.function_call_id))
    )


@unary("FunctionCallList")
async def _list(peer: Peer, request: Any) -> Any:
    calls = [call for call in peer.plane.calls.values() if call.fn.id == request.function_id]
    return pb.FunctionCallListResponse(function_calls=[_info(call) for call in calls])


@unary("FunctionGetCallGraph")
async def _call_graph(peer: Peer, request: Any) -> Any:
    children: dict[str, list[Call]] = {}
    for call in peer.plane.calls.values():
        children.setdefault(call.parent, []).append(call)
    pending = [known_call(peer.plane, request.function_call_id)]
    response = pb.FunctionGetCallGraphResponse()
    while pending:
        call = pending.pop()
        response.function_calls.add(
            function_call_id=call.id,
            parent_input_id=call.parent,
            function_name=call.fn.tag,
            module_name=call.fn.definition.module_name,
        )
        for item in call.inputs.values():
            output = call.outputs.get(item.index)
            response.inputs.add(
                input_id=item.id,
                function_call_id=call.id,
                task_id=item.task.id if item.task else "",
                status=output.result.status if output else 0,
            )
            pending += children.get(item.id, [])
    return response


@unary("FunctionCallCancel")
async def _cancel(peer: Peer, request: Any) -> Any:
    call = known_call(peer.plane, request.function_call_id)
    items: list[Input] = list(call.inputs.values())
    for item in items:
        cancel(peer.plane, item, request.terminate_containers)
    return Empty()


@unary("FunctionCallPutDataOut")
async def _put_data(peer: Peer, request: Any) -> Any:
    call = known_call(peer.plane, request.function_call_id)
    call.data_out.extend(request.data_chunks)
    call.data_added.fire()
    return Empty()


@streaming("FunctionCallGetDataOut")
async def _get_data(peer: Peer, request: Any) -> AsyncIterator[Any]:
    call = known_call(peer.plane, request.function_call_id)
    position, end = request.last_index, time.time() + STREAM_SECONDS
    while (left := end - time.time()) > 0:
        while position < len(call.data_out):
            yield call.data_out[position]
            position += 1
        await call.data_added.wait(left)
