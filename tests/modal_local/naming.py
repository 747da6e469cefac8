"""Objects that have a name in an environment: one table for all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from .rpc import not_found
from .state import ControlPlane, new_id

CREATE_IF_MISSING = pb.OBJECT_CREATION_TYPE_CREATE_IF_MISSING
FAIL_IF_EXISTS = pb.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS
OVERWRITE = pb.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS
CREATING = (CREATE_IF_MISSING, FAIL_IF_EXISTS, OVERWRITE)
PAGE = 100


class Named(Protocol):
    """What `page` needs of an object."""

    id: str
    name: str
    created: float


N = TypeVar("N", bound=Named)


def environment_of(request: Any) -> str:
    """Return the environment a request is about."""
    return str(request.environment_name or "main")


def get_or_create(
    plane: ControlPlane, prefix: str, request: Any, create: Callable[[str], None]
) -> str:
    """Return the id of the object a request names, after making it where the request says so."""
    name, how = request.deployment_name, request.object_creation_type
    key = (prefix, environment_of(request), name)
    identity = plane.named.get(key) if name else None
    if identity and how == FAIL_IF_EXISTS:
        raise GRPCError(Status.ALREADY_EXISTS, f"'{name}' already exists")
    if identity is not None and how != OVERWRITE:
        return identity
    if name and how not in CREATING:
        raise not_found(f"'{name}' not found in environment '{key[1]}'")
    identity = identity or new_id(prefix)
    create(identity)
    if name:
        plane.named[key] = identity
    return identity


def forget(plane: ControlPlane, identity: str) -> None:
    """Remove the name of an object."""
    plane.named = {key: value for key, value in plane.named.items() if value != identity}


def page(plane: ControlPlane, prefix: str, table: dict[str, N], request: Any) -> Iterable[N]:
    """Return the named objects of an environment, newest first, as far as one answer holds."""
    environment = environment_of(request)
    found = [
        table[identity]
        for (kind, where, _), identity in plane.named.items()
        if kind == prefix and where == environment and identity in table
    ]
    before = request.pagination.created_before
    if before:
        found = [item for item in found if item.created < before]
    found.sort(key=lambda item: item.created, reverse=True)
    return found[: request.pagination.max_objects or PAGE]


def creation(item: Named) -> Any:
    """Return when an object was made, as the client wants it."""
    return pb.CreationInfo(created_at=item.created, created_by="local")
