"""Volumes, as clients and containers use them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from . import naming
from .containers import open_files
from .layouts import volume_metadata
from .rpc import Empty, Peer, not_found, streaming, unary
from .state import Task
from .volumes import BLOCK, Checkout, Volume, VolumeFullError


def _known(peer: Peer, identity: str) -> Volume:
    volume = peer.plane.volumes.get(identity)
    if volume is None:
        raise not_found(f"Volume {identity} not found")
    return volume


@unary("VolumeGetOrCreate")
async def _get_or_create(peer: Peer, request: Any) -> Any:
    plane, name = peer.plane, request.deployment_name
    environment = naming.environment_of(request)

    def create(identity: str) -> None:
        version = request.version or pb.VOLUME_FS_VERSION_V1
        folder = name if environment == "main" else f"{environment}.{name}"
        root = plane.dir / "volumes" / (folder if name else identity)
        plane.volumes[identity] = Volume(identity, name, version, root)

    identity = naming.get_or_create(plane, "vo", request, create)
    volume = plane.volumes[identity]
    return pb.VolumeGetOrCreateResponse(
        volume_id=identity,
        version=volume.version,  # type: ignore[arg-type]
        metadata=volume_metadata(volume),
    )


@unary("VolumeGetById")
async def _get_by_id(peer: Peer, request: Any) -> Any:
    volume = _known(peer, request.volume_id)
    return pb.VolumeGetByIdResponse(volume_id=volume.id, metadata=volume_metadata(volume))


@unary("VolumeList")
async def _list(peer: Peer, request: Any) -> Any:
    items = [
        pb.VolumeListItem(
            label=volume.name,
            volume_id=volume.id,
            created_at=volume.created,
            metadata=volume_metadata(volume),
        )
        for volume in naming.page(peer.plane, "vo", peer.plane.volumes, request)
    ]
    return pb.VolumeListResponse(items=items, environment_name=naming.environment_of(request))


@unary("VolumeHeartbeat")
async def _heartbeat(peer: Peer, request: Any) -> Any:
    return Empty()


@unary("VolumeRename")
async def _rename(peer: Peer, request: Any) -> Any:
    volume = _known(peer, request.volume_id)
    for key, identity in list(peer.plane.named.items()):
        if identity == volume.id:
            del peer.plane.named[key]
            peer.plane.named["vo", key[1], request.name] = identity
    volume.name = request.name
    return Empty()


@unary("VolumeDelete")
async def _delete(peer: Peer, request: Any) -> Any:
    volume = _known(peer, request.volume_id)
    del peer.plane.volumes[volume.id]
    naming.forget(peer.plane, volume.id)
    shutil.rmtree(volume.root, ignore_errors=True)
    return Empty()


def _checkouts(peer: Peer, identity: str) -> tuple[Task, list[Checkout]]:
    task = peer.container()
    return task, task.checkouts.get(identity, [])


async def _commit(checkouts: list[Checkout]) -> None:
    for checkout in checkouts:
        if not checkout.read_only:
            try:
                await asyncio.to_thread(checkout.commit)
            except VolumeFullError as error:
                # Not a status that the client repeats.
                raise GRPCError(Status.RESOURCE_EXHAUSTED, str(error)) from None


@unary("VolumeCommit")
async def _volume_commit(peer: Peer, request: Any) -> Any:
    _, checkouts = _checkouts(peer, request.volume_id)
    await _commit(checkouts)
    return pb.VolumeCommitResponse(skip_reload=not peer.plane.options.commit_reloads)


@unary("VolumeReload")
async def _volume_reload(peer: Peer, request: Any) -> Any:
    task, checkouts = _checkouts(peer, request.volume_id)
    if not checkouts:
        return Empty()
    busy = await asyncio.to_thread(open_files, task, request.volume_id)
    if busy:
        # The wording is the service's: the client looks for it.
        text = f"there are open files preventing the operation: {busy[:3]}"
        raise GRPCError(Status.FAILED_PRECONDITION, text)
    await _commit(checkouts)
    for checkout in checkouts:
        await asyncio.to_thread(checkout.pull)
    return Empty()


def _entries(peer: Peer, request: Any) -> list[Any]:
    volume = _known(peer, request.volume_id)
    base, root = volume.path(request.path), volume.root.resolve()
    if not base.exists():
        raise not_found(f"No such file or directory: {request.path}")
    found = [base] if base.is_file() else base.rglob("*") if request.recursive else base.iterdir()
    entries = []
    for path in sorted(found):
        status, folder = path.lstat(), path.is_dir()
        kind = pb.FileEntry.DIRECTORY if folder else pb.FileEntry.FILE
        if path.is_symlink():
            kind = pb.FileEntry.SYMLINK
        entries.append(
            pb.FileEntry(
                path=str(path.relative_to(root)),
                mtime=int(status.st_mtime),
                size=0 if folder else status.st_size,
                type=kind,
            )
        )
    return entries


@streaming("VolumeListFiles")
async def _list_files(peer: Peer, request: Any) -> AsyncIterator[Any]:
    yield pb.VolumeListFilesResponse(entries=_entries(peer, request))


@streaming("VolumeListFiles2")
async def _list_files_2(peer: Peer, request: Any) -> AsyncIterator[Any]:
    yield pb.VolumeListFiles2Response(entries=_entries(peer, request))


@unary("VolumeGetFile2")
async def _get_file(peer: Peer, request: Any) -> Any:
    volume = _known(peer, request.volume_id)
    path = volume.path(request.path)
    if not path.is_file():
        raise not_found(f"No such file: {request.path}")
    size = path.stat().st_size
    length = min(request.len, size - request.start) if request.len else size - request.start
    end = request.start + length
    urls = [
        f"{peer.plane.http_url}/volume/{volume.id}/{start}/{min(BLOCK, end - start)}/"
        + request.path.lstrip("/")
        for start in range(request.start, end, BLOCK)
    ]
    return pb.VolumeGetFile2Response(get_urls=urls, size=size, start=request.start, len=length)


async def _change(function: Callable[..., None], *arguments: Any) -> None:
    """Change a volume in a thread; turn its errors into those of the service."""
    try:
        await asyncio.to_thread(function, *arguments)
    except VolumeFullError as error:
        raise GRPCError(Status.RESOURCE_EXHAUSTED, str(error)) from None
    except (ValueError, IsADirectoryError) as error:
        raise GRPCError(Status.INVALID_ARGUMENT, str(error)) from None
    except FileNotFoundError as error:
        raise not_found(str(error)) from None


def _check_absent(volume: Volume, paths: list[str], wanted: bool) -> None:
    for path in paths if wanted else ():
        if volume.path(path).exists():
            raise GRPCError(Status.ALREADY_EXISTS, f"{path} already exists")


@unary("VolumePutFiles")
async def _put_files(peer: Peer, request: Any) -> Any:
    volume = _known(peer, request.volume_id)
    names = [file.filename for file in request.files]
    _check_absent(volume, names, request.disallow_overwrite_existing_files)
    for file in request.files:
        blocks = [peer.plane.cas / file.sha256_hex]
        await _change(volume.write, file.filename, blocks, file.mode)
    return Empty()


@unary("VolumePutFiles2")
async def _put_files_2(peer: Peer, request: Any) -> Any:
    plane, volume = peer.plane, _known(peer, request.volume_id)
    response = pb.VolumePutFiles2Response()
    for number, file in enumerate(request.files):
        for index, block in enumerate(file.blocks):
            name = block.contents_sha256.hex()
            if not (plane.cas / name).exists():
                url = f"{plane.http_url}/block/{name}"
                response.missing_blocks.add(file_index=number, block_index=index, put_url=url)
    if response.missing_blocks:
        return response
    names = [file.path for file in request.files]
    _check_absent(volume, names, request.disallow_overwrite_existing_files)
    for file in request.files:
        blocks = [plane.cas / block.contents_sha256.hex() for block in file.blocks]
        await _change(volume.write, file.path, blocks, file.mode, file.size)
    return response


async def _remove(peer: Peer, request: Any) -> Any:
    volume = _known(peer, request.volume_id)
    path = volume.path(request.path)
    if not path.exists():
        raise not_found(f"No such file or directory: {request.path}")
    if path.is_dir() and not request.recursive:
        raise GRPCError(Status.INVALID_ARGUMENT, f"{request.path} is a folder")
    await _change(volume.remove, request.path)
    return Empty()


async def _copy(peer: Peer, request: Any) -> Any:
    volume = _known(peer, request.volume_id)
    await _change(volume.copy, list(request.src_paths), request.dst_path, request.recursive)
    return Empty()


unary("VolumeRemoveFile")(_remove)
unary("VolumeRemoveFile2")(_remove)
unary("VolumeCopyFiles")(_copy)
unary("VolumeCopyFiles2")(_copy)
