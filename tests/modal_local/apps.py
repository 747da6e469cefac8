"""Sessions, environments and apps with their versions."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from .layouts import app_layout
from .naming import CREATE_IF_MISSING, environment_of
from .rpc import Empty, Peer, not_found, unary
from .scheduling import reconcile, stop_app
from .state import App, ControlPlane, Version, new_id

DAY = 86400


@unary("ClientHello")
async def _client_hello(peer: Peer, request: Any) -> Any:
    return pb.ClientHelloResponse()


@unary("AuthTokenGet")
async def _auth_token(peer: Peer, request: Any) -> Any:
    def encode(content: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()

    claims = {"exp": int(time.time()) + DAY}
    return pb.AuthTokenGetResponse(token=f"{encode({'alg': 'none'})}.{encode(claims)}.x")


@unary("WorkspaceNameLookup")
async def _workspace(peer: Peer, request: Any) -> Any:
    return pb.WorkspaceNameLookupResponse(workspace_name="local", username="local")


@unary("ObjectSuggest")
async def _suggest(peer: Peer, request: Any) -> Any:
    return pb.ObjectSuggestResponse()


@unary("EnvironmentGetOrCreate")
async def _environment(peer: Peer, request: Any) -> Any:
    # Newer builder versions need no mounts of the client's dependencies.
    settings = pb.EnvironmentSettings(image_builder_version="2025.06", webhook_suffix="")
    name = request.deployment_name or "main"
    return pb.EnvironmentGetOrCreateResponse(
        environment_id="en-local",
        metadata=pb.EnvironmentMetadata(name=name, settings=settings),
    )


@unary("EnvironmentList")
async def _environments(peer: Peer, request: Any) -> Any:
    item = pb.EnvironmentListItem(name="main", environment_id="en-local", default=True)
    return pb.EnvironmentListResponse(items=[item])


def _new_app(plane: ControlPlane, name: str, environment: str, state: int) -> App:
    app = App(new_id("ap"), name, state, environment)
    plane.apps[app.id] = app
    return app


def known_app(plane: ControlPlane, identity: str) -> App:
    """Return an app by id."""
    app = plane.apps.get(identity)
    if app is None:
        raise not_found(f"App {identity} not found")
    return app


@unary("AppCreate")
async def _create(peer: Peer, request: Any) -> Any:
    app = _new_app(peer.plane, request.description, environment_of(request), request.app_state)
    app.tags = dict(request.tags)
    return pb.AppCreateResponse(
        app_id=app.id, app_page_url=f"local://{app.id}", app_logs_url=f"local://{app.id}/logs"
    )


@unary("AppGetOrCreate")
async def _get_or_create(peer: Peer, request: Any) -> Any:
    plane, key = peer.plane, (environment_of(request), request.app_name)
    app = plane.deployed.get(key)
    if app is None or app.done:
        if request.object_creation_type != CREATE_IF_MISSING:
            raise not_found(f"App '{request.app_name}' not found")
        app = _new_app(plane, request.app_name, key[0], pb.APP_STATE_DEPLOYED)
        plane.deployed[key] = app
    return pb.AppGetOrCreateResponse(app_id=app.id)


def _lifecycle(app: App) -> Any:
    current = app.versions.get(app.version)
    return pb.AppLifecycle(
        app_state=app.state,  # type: ignore[arg-type]
        created_at=app.created,
        created_by="local",
        deployed_at=current.deployed_at if current else 0,
        deployed_by="local",
        version=app.version,
        stopped_at=app.stopped,
    )


@unary("AppGetByDeploymentName")
async def _by_name(peer: Peer, request: Any) -> Any:
    environment = environment_of(request)
    response = pb.AppGetByDeploymentNameResponse(environment_name=environment)
    app = peer.plane.deployed.get((environment, request.name))
    if app is not None:
        setattr(response, "previous_app_id" if app.done else "app_id", app.id)
        response.lifecycle.CopyFrom(_lifecycle(app))
    return response


@unary("AppGetLifecycle")
async def _get_lifecycle(peer: Peer, request: Any) -> Any:
    app = known_app(peer.plane, request.app_id)
    return pb.AppGetLifecycleResponse(lifecycle=_lifecycle(app))


@unary("AppGetLayout")
async def _get_layout(peer: Peer, request: Any) -> Any:
    app = known_app(peer.plane, request.app_id)
    return pb.AppGetLayoutResponse(app_layout=app_layout(app, app.version))


@unary("AppPublish")
async def _publish(peer: Peer, request: Any) -> Any:
    plane, app, now = peer.plane, known_app(peer.plane, request.app_id), time.time()
    app.state, app.tags = request.app_state, dict(request.tags) or app.tags
    if request.app_state == pb.APP_STATE_DEPLOYED:
        app.name = request.name
        plane.deployed[app.env, request.name] = app
        version = Version(
            number=max(app.versions, default=0) + 1,
            function_ids=dict(request.function_ids),
            class_ids=dict(request.class_ids),
            deployed_at=now,
            tag=request.deployment_tag,
            client_version=request.client_version,
            commit=request.commit_info,
        )
        app.versions[version.number] = version
        _activate(plane, app, version)
    else:
        app.function_ids, app.class_ids = dict(request.function_ids), dict(request.class_ids)
    for identity in request.function_ids.values():
        reconcile(plane, plane.fns[identity])
    return pb.AppPublishResponse(url=f"local://{app.id}", deployed_at=now)


def _activate(plane: ControlPlane, app: App, version: Version) -> None:
    """Make a version the one that lookups by name find; older ones finish what they have."""
    app.function_ids, app.class_ids = version.function_ids, version.class_ids
    app.version = version.number
    for fn in app.functions:
        # A rollback brings back functions of an old version; they move to the new one.
        if fn.version == 0 or (version.rollback_of and fn.version == version.rollback_of):
            fn.version = version.number
    for identity, number in app.classes.items():
        if number in (0, version.rollback_of):
            app.classes[identity] = version.number


@unary("AppRollback")
async def _rollback(peer: Peer, request: Any) -> Any:
    app = known_app(peer.plane, request.app_id)
    wanted = app.version + request.version if request.version < 0 else request.version
    old = app.versions.get(wanted)
    if old is None:
        raise GRPCError(Status.NOT_FOUND, f"App '{app.name}' has no version {wanted}")
    version = Version(
        number=max(app.versions) + 1,
        function_ids=old.function_ids,
        class_ids=old.class_ids,
        deployed_at=time.time(),
        tag=old.tag,
        client_version=old.client_version,
        rollback_of=old.number,
    )
    app.versions[version.number] = version
    _activate(peer.plane, app, version)
    return pb.AppRollbackResponse()


@unary("AppDeploymentHistory")
async def _history(peer: Peer, request: Any) -> Any:
    app = known_app(peer.plane, request.app_id)
    histories = [
        pb.AppDeploymentHistory(
            app_id=app.id,
            version=version.number,
            client_version=version.client_version,
            deployed_at=version.deployed_at,
            deployed_by="local",
            tag=version.tag,
            rollback_version=version.rollback_of,
            rollback_allowed=True,
            commit_info=version.commit,
        )
        for version in sorted(app.versions.values(), key=lambda item: -item.number)
    ]
    return pb.AppDeploymentHistoryResponse(
        app_deployment_histories=histories, production_app_version=app.version
    )


@unary("AppHeartbeat")
async def _heartbeat(peer: Peer, request: Any) -> Any:
    known_app(peer.plane, request.app_id).last_heartbeat = time.time()
    return Empty()


@unary("AppClientDisconnect")
async def _disconnect(peer: Peer, request: Any) -> Any:
    app = known_app(peer.plane, request.app_id)
    if app.state in (pb.APP_STATE_EPHEMERAL, pb.APP_STATE_INITIALIZING):
        stop_app(peer.plane, app)
    elif app.state == pb.APP_STATE_DETACHED:
        app.state = pb.APP_STATE_DETACHED_DISCONNECTED
    return Empty()


@unary("AppStop")
async def _stop(peer: Peer, request: Any) -> Any:
    stop_app(peer.plane, known_app(peer.plane, request.app_id))
    return Empty()


@unary("AppSetTags")
async def _set_tags(peer: Peer, request: Any) -> Any:
    known_app(peer.plane, request.app_id).tags = dict(request.tags)
    return Empty()


@unary("AppGetTags")
async def _get_tags(peer: Peer, request: Any) -> Any:
    return pb.AppGetTagsResponse(tags=known_app(peer.plane, request.app_id).tags)


@unary("AppList")
async def _list(peer: Peer, request: Any) -> Any:
    plane = peer.plane
    items = [
        pb.AppListResponse.AppListItem(
            app_id=app.id,
            description=app.name,
            name=app.name,
            state=app.state,  # type: ignore[arg-type]
            created_at=app.created,
            stopped_at=app.stopped,
            n_running_tasks=sum(task.fn.app is app for task in plane.tasks.values()),
        )
        for app in plane.apps.values()
        if not request.environment_name or app.env == request.environment_name
    ]
    return pb.AppListResponse(apps=items)
