"""Dicts and queues."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from modal_proto import api_pb2 as pb

from . import naming
from .rpc import Empty, Peer, not_found, streaming, unary
from .state import KeyValue

MAX_POLL = 50.0


def _dict(peer: Peer, request: Any) -> KeyValue:
    found = peer.plane.dicts.get(request.dict_id)
    if found is None:
        raise not_found(f"Dict {request.dict_id} not found")
    return found


def _queue(peer: Peer, request: Any) -> KeyValue:
    found = peer.plane.queues.get(request.queue_id)
    if found is None:
        raise not_found(f"Queue {request.queue_id} not found")
    return found


def _dict_metadata(item: KeyValue) -> Any:
    return pb.DictMetadata(name=item.name, creation_info=naming.creation(item))


def _queue_metadata(item: KeyValue) -> Any:
    return pb.QueueMetadata(name=item.name, creation_info=naming.creation(item))


@unary("DictGetOrCreate")
async def _dict_create(peer: Peer, request: Any) -> Any:
    table = peer.plane.dicts

    def create(identity: str) -> None:
        items = {entry.key: entry.value for entry in request.data}
        table[identity] = KeyValue(identity, request.deployment_name, items=items)

    identity = naming.get_or_create(peer.plane, "di", request, create)
    return pb.DictGetOrCreateResponse(dict_id=identity, metadata=_dict_metadata(table[identity]))


@unary("DictGetById")
async def _dict_by_id(peer: Peer, request: Any) -> Any:
    found = _dict(peer, request)
    return pb.DictGetByIdResponse(dict_id=found.id, metadata=_dict_metadata(found))


@unary("DictList")
async def _dict_list(peer: Peer, request: Any) -> Any:
    dicts = [
        pb.DictListResponse.DictInfo(
            name=item.name,
            created_at=item.created,
            dict_id=item.id,
            metadata=_dict_metadata(item),
        )
        for item in naming.page(peer.plane, "di", peer.plane.dicts, request)
    ]
    return pb.DictListResponse(dicts=dicts, environment_name=naming.environment_of(request))


@unary("DictDelete")
async def _dict_delete(peer: Peer, request: Any) -> Any:
    del peer.plane.dicts[_dict(peer, request).id]
    naming.forget(peer.plane, request.dict_id)
    return Empty()


@unary("DictHeartbeat")
async def _dict_heartbeat(peer: Peer, request: Any) -> Any:
    return Empty()


@unary("DictUpdate")
async def _dict_update(peer: Peer, request: Any) -> Any:
    items, created = _dict(peer, request).items, True
    for entry in request.updates:
        if request.if_not_exists and entry.key in items:
            created = False
        else:
            items[entry.key] = entry.value
    return pb.DictUpdateResponse(created=created)


@unary("DictGet")
async def _dict_get(peer: Peer, request: Any) -> Any:
    value = _dict(peer, request).items.get(request.key)
    return pb.DictGetResponse(found=value is not None, value=value)


@unary("DictContains")
async def _dict_contains(peer: Peer, request: Any) -> Any:
    return pb.DictContainsResponse(found=request.key in _dict(peer, request).items)


@unary("DictPop")
async def _dict_pop(peer: Peer, request: Any) -> Any:
    value = _dict(peer, request).items.pop(request.key, None)
    return pb.DictPopResponse(found=value is not None, value=value)


@unary("DictLen")
async def _dict_len(peer: Peer, request: Any) -> Any:
    return pb.DictLenResponse(len=len(_dict(peer, request).items))


@unary("DictClear")
async def _dict_clear(peer: Peer, request: Any) -> Any:
    _dict(peer, request).items.clear()
    return Empty()


@streaming("DictContents")
async def _dict_contents(peer: Peer, request: Any) -> AsyncIterator[Any]:
    for key, value in list(_dict(peer, request).items.items()):
        yield pb.DictEntry(key=key if request.keys else b"", value=value if request.values else b"")


@unary("QueueGetOrCreate")
async def _queue_create(peer: Peer, request: Any) -> Any:
    table = peer.plane.queues

    def create(identity: str) -> None:
        table[identity] = KeyValue(identity, request.deployment_name)

    identity = naming.get_or_create(peer.plane, "qu", request, create)
    metadata = _queue_metadata(table[identity])
    return pb.QueueGetOrCreateResponse(queue_id=identity, metadata=metadata)


@unary("QueueGetById")
async def _queue_by_id(peer: Peer, request: Any) -> Any:
    found = _queue(peer, request)
    return pb.QueueGetByIdResponse(queue_id=found.id, metadata=_queue_metadata(found))


@unary("QueueList")
async def _queue_list(peer: Peer, request: Any) -> Any:
    queues = [
        pb.QueueListResponse.QueueInfo(
            name=item.name,
            created_at=item.created,
            num_partitions=len(item.partitions),
            total_size=sum(map(len, item.partitions.values())),
            queue_id=item.id,
            metadata=_queue_metadata(item),
        )
        for item in naming.page(peer.plane, "qu", peer.plane.queues, request)
    ]
    return pb.QueueListResponse(queues=queues)


@unary("QueueDelete")
async def _queue_delete(peer: Peer, request: Any) -> Any:
    del peer.plane.queues[_queue(peer, request).id]
    naming.forget(peer.plane, request.queue_id)
    return Empty()


@unary("QueueHeartbeat")
async def _queue_heartbeat(peer: Peer, request: Any) -> Any:
    return Empty()


@unary("QueuePut")
async def _queue_put(peer: Peer, request: Any) -> Any:
    queue = _queue(peer, request)
    queue.partitions.setdefault(request.partition_key, []).extend(request.values)
    queue.changed.fire()
    return Empty()


@unary("QueueGet")
async def _queue_get(peer: Peer, request: Any) -> Any:
    queue, key = _queue(peer, request), request.partition_key
    end = time.time() + min(request.timeout, MAX_POLL)
    while not queue.partitions.get(key) and (left := end - time.time()) > 0:
        await queue.changed.wait(left)
    values = queue.partitions.get(key, [])
    count = max(1, request.n_values)
    taken, values[:count] = values[:count], []
    queue.offset[key] = queue.offset.get(key, 0) + len(taken)
    return pb.QueueGetResponse(values=taken)


@unary("QueueNextItems")
async def _queue_next(peer: Peer, request: Any) -> Any:
    """Read without taking; an entry's id is its position since the queue was made."""
    queue, key = _queue(peer, request), request.partition_key
    end = time.time() + min(request.item_poll_timeout, MAX_POLL)
    while True:
        first = queue.offset.get(key, 0)
        values = queue.partitions.get(key, [])
        start = max(0, int(request.last_entry_id or -1) + 1 - first)
        left = end - time.time()
        if values[start:] or left <= 0:
            break
        await queue.changed.wait(left)
    items = [
        pb.QueueItem(value=value, entry_id=str(first + start + number))
        for number, value in enumerate(values[start:])
    ]
    return pb.QueueNextItemsResponse(items=items)


@unary("QueueClear")
async def _queue_clear(peer: Peer, request: Any) -> Any:
    queue = _queue(peer, request)
    if request.all_partitions:
        queue.partitions.clear()
    else:
        queue.partitions.pop(request.partition_key, None)
    return Empty()


@unary("QueueLen")
async def _queue_len(peer: Peer, request: Any) -> Any:
    partitions = _queue(peer, request).partitions
    if request.total:
        return pb.QueueLenResponse(len=sum(map(len, partitions.values())))
    return pb.QueueLenResponse(len=len(partitions.get(request.partition_key, ())))
