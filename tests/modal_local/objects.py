"""Images, mounts and secrets. Images are recorded, not built: ENV and WORKDIR apply."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from typing import Any

from modal_proto import api_pb2 as pb

from . import naming
from .rpc import Empty, Peer, not_found, streaming, unary
from .state import FAILURE, SUCCESS, ControlPlane, Result, Secret, new_id

WORKDIR = "__WORKDIR__"


def image_metadata() -> Any:
    """Return what the client keeps of any image."""
    version = ".".join(map(str, sys.version_info[:3]))
    return pb.ImageMetadata(python_version_info=version, image_builder_version="2025.06")


def image_environment(plane: ControlPlane, identity: str) -> dict[str, str]:
    """Return the variables of an image and of those it is based on; WORKDIR under its own key."""
    image = plane.images.get(identity)
    environment: dict[str, str] = {}
    if image is None:
        return environment
    for base in image.base_images:
        environment.update(image_environment(plane, base.image_id))
    for command in image.dockerfile_commands:
        if command.startswith("ENV "):
            for part in shlex.split(command[4:]):
                key, _, value = part.partition("=")
                environment[key] = value
        elif command.startswith("WORKDIR "):
            environment[WORKDIR] = command.split(None, 1)[1].strip()
    return environment


@unary("ImageGetOrCreate")
async def _image(peer: Peer, request: Any) -> Any:
    content = request.image.SerializeToString(deterministic=True)
    identity = f"im-{hashlib.sha256(content).hexdigest()[:22]}"
    lines = "\n".join(request.image.dockerfile_commands)
    if any(text in lines for text in peer.plane.broken_builds):
        return pb.ImageGetOrCreateResponse(image_id=identity, result=Result(status=FAILURE))
    peer.plane.images[identity] = request.image
    return pb.ImageGetOrCreateResponse(
        image_id=identity, result=Result(status=SUCCESS), metadata=image_metadata()
    )


@unary("ImageFromId")
async def _image_from_id(peer: Peer, request: Any) -> Any:
    return pb.ImageFromIdResponse(image_id=request.image_id, metadata=image_metadata())


@streaming("ImageJoinStreaming")
async def _image_join(peer: Peer, request: Any) -> AsyncIterator[Any]:
    yield pb.ImageJoinStreamingResponse(
        result=Result(status=SUCCESS), eof=True, metadata=image_metadata()
    )


@unary("MountBatchedCheckExistence")
async def _missing_files(peer: Peer, request: Any) -> Any:
    cas = peer.plane.cas
    missing = [name for name in request.sha256_hex_hashes if not (cas / name).exists()]
    return pb.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)


@unary("MountPutFile")
async def _put_file(peer: Peer, request: Any) -> Any:
    target = peer.plane.cas / request.sha256_hex
    which = request.WhichOneof("data_oneof")
    if which == "data":
        target.write_bytes(request.data)
    elif which == "data_blob_id":
        shutil.copyfile(peer.plane.cas / f"blob-{request.data_blob_id}", target)
    return pb.MountPutFileResponse(exists=target.exists())


@unary("MountGetOrCreate")
async def _mount(peer: Peer, request: Any) -> Any:
    plane, name = peer.plane, request.deployment_name
    if request.files or request.object_creation_type:
        files = sorted(request.files, key=lambda file: file.filename)
        content = b"".join(file.SerializeToString(deterministic=True) for file in files)
        digest = hashlib.sha256(content).hexdigest()
        identity = f"mo-{digest[:22]}"
        plane.mounts[identity] = files
    else:
        # The mounts of the client's own dependencies: the environment of the host plays them.
        digest = hashlib.sha256(name.encode()).hexdigest()
        identity = plane.named.get(("mo", "", name), f"mo-{digest[:22]}")
        plane.mounts.setdefault(identity, [])
    if name:
        plane.named["mo", "", name] = identity
    return pb.MountGetOrCreateResponse(
        mount_id=identity,
        handle_metadata=pb.MountHandleMetadata(content_checksum_sha256_hex=digest),
    )


def _secret_metadata(secret: Secret, environment: str = "main") -> Any:
    return pb.SecretMetadata(
        name=secret.name,
        creation_info=naming.creation(secret),
        keys=sorted(secret.env),
        environment_name=environment,
    )


@unary("SecretGetOrCreate")
async def _secret(peer: Peer, request: Any) -> Any:
    plane, name = peer.plane, request.deployment_name

    def create(identity: str) -> None:
        plane.secrets[identity] = Secret(identity, name, dict(request.env_dict))

    identity = naming.get_or_create(plane, "st", request, create)
    secret = plane.secrets[identity]
    missing = [key for key in request.required_keys if key not in secret.env]
    if missing:
        raise not_found(f"Secret '{name}' is missing key(s): {', '.join(missing)}")
    return pb.SecretGetOrCreateResponse(
        secret_id=identity, metadata=_secret_metadata(secret, naming.environment_of(request))
    )


def _known_secret(peer: Peer, request: Any) -> Secret:
    secret = peer.plane.secrets.get(request.secret_id)
    if secret is None:
        raise not_found(f"Secret {request.secret_id} not found")
    return secret


@unary("SecretGetInfo")
async def _secret_info(peer: Peer, request: Any) -> Any:
    return pb.SecretGetInfoResponse(metadata=_secret_metadata(_known_secret(peer, request)))


@unary("SecretUpdate")
async def _secret_update(peer: Peer, request: Any) -> Any:
    secret = _known_secret(peer, request)
    for update in request.updates:
        if update.HasField("value"):
            secret.env[update.key] = update.value
        else:
            secret.env.pop(update.key, None)
    return Empty()


@unary("SecretList")
async def _secret_list(peer: Peer, request: Any) -> Any:
    environment = naming.environment_of(request)
    items = [
        pb.SecretListItem(
            label=secret.name,
            created_at=secret.created,
            environment_name=environment,
            secret_id=secret.id,
            metadata=_secret_metadata(secret, environment),
        )
        for secret in naming.page(peer.plane, "st", peer.plane.secrets, request)
    ]
    return pb.SecretListResponse(items=items, environment_name=environment)


@unary("SecretDelete")
async def _secret_delete(peer: Peer, request: Any) -> Any:
    _known_secret(peer, request)
    peer.plane.secrets.pop(request.secret_id)
    naming.forget(peer.plane, request.secret_id)
    return Empty()


@unary("BlobCreate")
async def _blob_create(peer: Peer, request: Any) -> Any:
    identity = new_id("bl")
    peer.plane.blobs_created += 1
    url = f"{peer.plane.http_url}/blob/{identity}"
    return pb.BlobCreateResponse(blob_ids=[identity], upload_urls=pb.UploadUrlList(items=[url]))


@unary("BlobGet")
async def _blob_get(peer: Peer, request: Any) -> Any:
    return pb.BlobGetResponse(download_url=f"{peer.plane.http_url}/blob/{request.blob_id}")
