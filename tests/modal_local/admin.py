"""State and faults, over HTTP."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from grpclib import Status
from modal_proto import api_pb2 as pb

from .containers import kill, main_pid
from .image_lint import missing_imports
from .rpc import go_down
from .scheduling import drain_idle, expire, preempt
from .state import STATUS_NAMES, Call, ControlPlane, Fault, Fn, Input


def gpu_text(definition: Any) -> str:
    """Return a GPU request as one writes it, such as `H100:8`."""
    gpu = definition.resources.gpu_config
    return f"{gpu.gpu_type}:{gpu.count}" if gpu.count else ""


def _gpu(fn: Fn) -> str | list[str]:
    ranked = [gpu_text(choice.function) for choice in fn.data.ranked_functions] if fn.data else []
    if len(ranked) > 1 and not fn.base:
        return ranked
    return gpu_text(fn.definition)


def _function(plane: ControlPlane, fn: Fn) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "tag": fn.tag,
        "app": fn.app.id,
        "app_name": fn.app.name,
        "version": fn.version,
        "base": fn.base,
        "queued": len(fn.queue),
        "containers": len(fn.tasks),
        "containers_started": fn.started,
        "url": fn.url,
    }
    definition = fn.definition
    if definition is None:
        return entry
    resources, policy = definition.resources, definition.retry_policy
    volumes = {
        mount.mount_path: {
            "volume": plane.volumes[mount.volume_id].name
            if mount.volume_id in plane.volumes
            else mount.volume_id,
            "read_only": mount.read_only,
            "sub_path": mount.sub_path,
        }
        for mount in definition.volume_mounts
    }
    return entry | {
        "gpu": _gpu(fn),
        "cpu": resources.milli_cpu / 1000,
        "memory": resources.memory_mb,
        "timeout": definition.timeout_secs,
        "startup_timeout": definition.startup_timeout_secs,
        "single_use": definition.single_use_containers,
        "max_containers": int(fn.setting("max_containers", "concurrency_limit")),
        "min_containers": int(fn.setting("min_containers", "warm_pool_size")),
        "scaledown_window": int(fn.setting("scaledown_window", "task_idle_timeout_secs")),
        "concurrency": fn.concurrency,
        "retries": policy.retries,
        "retry_policy": {
            "initial_delay": policy.initial_delay_ms / 1000,
            "backoff": policy.backoff_coefficient,
            "max_delay": policy.max_delay_ms / 1000,
        },
        "volumes": volumes,
        "secrets": len(definition.secret_ids),
        "regions": list(definition.scheduler_placement.regions),
        "cloud": definition.cloud_provider_str,
        "image": definition.image_id,
    }


def _status(call: Call, item: Input) -> str:
    if not item.done:
        return "running" if item.task else "pending"
    output = call.outputs.get(item.index)
    return STATUS_NAMES.get(output.result.status, "unknown") if output else "expired"


def _call(call: Call) -> dict[str, Any]:
    items = list(call.inputs.values())
    return {
        "function": call.fn.id,
        "tag": call.fn.tag,
        "created": call.created,
        "parent": call.parent,
        "inputs": len(items),
        "done": len(call.outputs),
        "expired": call.expired,
        "status": [_status(call, item) for item in items],
        "starts": [item.starts for item in items],
        "attempts": [item.attempt for item in items],
        "retries": [item.user_retries for item in items],
        "crashes": [item.crashes for item in items],
        "preemptions": sum(item.preemptions for item in items),
    }


def state(plane: ControlPlane) -> dict[str, Any]:
    """Return everything a test may ask about."""
    return {
        "isolation": plane.isolation,
        "isolation_reason": plane.isolation_reason,
        "apps": {
            app.id: {
                "name": app.name,
                "state": pb.AppState.Name(app.state),
                "environment": app.env,
                "version": app.version,
                "versions": {number: item.function_ids for number, item in app.versions.items()},
                "tags": app.tags,
            }
            for app in plane.apps.values()
        },
        "functions": {fn.id: _function(plane, fn) for fn in plane.fns.values()},
        "tasks": {
            task.id: {
                "function": task.fn.id,
                "tag": task.fn.tag,
                "pid": main_pid(plane, task),
                "running": list(task.running),
                "calls": sorted({item.call.id for item in task.running.values()}),
                "gpu": task.fn.gpus,
                "gpu_type": gpu_text(task.fn.definition),
                "ready": task.ready,
                "draining": task.draining,
                "fetched": task.fetched,
            }
            for task in plane.tasks.values()
        },
        "calls": {call.id: _call(call) for call in plane.calls.values()},
        "volumes": {
            volume.id: {"name": volume.name, "version": volume.version, "full": volume.full}
            for volume in plane.volumes.values()
        },
        "counters": {
            "rpcs": sum(plane.rpcs.values()),
            "unimplemented": sum(plane.unimplemented.values()),
            "blobs_created": plane.blobs_created,
            "containers_started": plane.containers_started,
            "containers_forked": plane.containers_forked,
        },
        "rpcs": dict(plane.rpcs),
        "unimplemented": dict(plane.unimplemented),
    }


def _lookup(table: dict[str, Any], request: web.Request) -> Any:
    found = table.get(request.match_info["id"])
    if found is None:
        raise web.HTTPNotFound(text=f"no {request.match_info['id']}")
    return found


def _fault(request: web.Request, status: Status | None) -> Fault:
    query = request.query
    return Fault(
        query.get("rpc", ""),
        int(query.get("count", "1")),
        float(query.get("seconds", "0")),
        status,
    )


def read_routes(plane: ControlPlane) -> list[web.RouteDef]:
    """Return the addresses that tell something."""

    async def get_state(request: web.Request) -> web.Response:
        return web.json_response(state(plane))

    async def get_lint(request: web.Request) -> web.Response:
        found = {
            fn.id: {"tag": fn.tag, "missing_imports": missing_imports(plane, fn)}
            for fn in plane.fns.values()
            if fn.definition is not None and not fn.base
        }
        return web.json_response(found)

    return [web.get("/admin/state", get_state), web.get("/admin/lint", get_lint)]


def fault_routes(plane: ControlPlane) -> list[web.RouteDef]:
    """Return the addresses that break something."""

    async def post_preempt(request: web.Request) -> web.Response:
        preempt(plane, _lookup(plane.tasks, request))
        return web.Response()

    async def post_kill(request: web.Request) -> web.Response:
        task = _lookup(plane.tasks, request)
        kill(plane, task)
        task.killing = False  # nobody decided this: its inputs count a crash
        return web.Response()

    async def post_expire(request: web.Request) -> web.Response:
        expire(_lookup(plane.calls, request))
        return web.Response()

    async def post_delay(request: web.Request) -> web.Response:
        plane.faults.append(_fault(request, None))
        return web.Response()

    async def post_fail(request: web.Request) -> web.Response:
        status = Status[request.query.get("status", "UNAVAILABLE")]
        plane.faults.append(_fault(request, status))
        return web.Response()

    async def post_down(request: web.Request) -> web.Response:
        plane.spawn(go_down(plane, float(request.query["seconds"])))
        return web.Response()

    async def post_break(request: web.Request) -> web.Response:
        plane.broken_builds = {request.query["text"]} - {""}
        return web.Response()

    async def post_full(request: web.Request) -> web.Response:
        named = [v for v in plane.volumes.values() if v.name == request.match_info["id"]]
        if not named:
            raise web.HTTPNotFound(text="no such volume")
        for volume in named:
            volume.full = request.query.get("full", "1") not in ("0", "false")
        return web.Response()

    async def post_cold(request: web.Request) -> web.Response:
        plane.cold = request.query["cold"] == "1"
        drain_idle(plane)  # no call gets a container that started otherwise
        return web.Response()

    return [
        web.post("/admin/preempt/{id}", post_preempt),
        web.post("/admin/kill/{id}", post_kill),
        web.post("/admin/expire/{id}", post_expire),
        web.post("/admin/delay", post_delay),
        web.post("/admin/fail", post_fail),
        web.post("/admin/down", post_down),
        web.post("/admin/full_volume/{id}", post_full),
        web.post("/admin/break_build", post_break),
        web.post("/admin/cold", post_cold),
    ]
