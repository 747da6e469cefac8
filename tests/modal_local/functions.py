"""Functions, classes, and their variants with other options or parameters."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message  # type: ignore[import-untyped]
from modal_proto import api_pb2 as pb

from .apps import known_app
from .layouts import function_metadata
from .naming import environment_of
from .rpc import Peer, not_found, unary
from .scheduling import reconcile
from .servers import ensure_url
from .state import App, ControlPlane, Fn, new_id

# options of FunctionOptions -> fields of Function, and of its AutoscalerSettings
PLAIN = {
    "timeout_secs": "timeout_secs",
    "max_concurrent_inputs": "max_concurrent_inputs",
    "target_concurrent_inputs": "target_concurrent_inputs",
    "batch_max_size": "batch_max_size",
    "batch_linger_ms": "batch_linger_ms",
    "cloud_provider_str": "cloud_provider_str",
    "routing_region": "routing_region",
}
AUTOSCALED = {
    "concurrency_limit": "max_containers",
    "buffer_containers": "buffer_containers",
    "task_idle_timeout_secs": "scaledown_window",
    "warm_pool_size": "min_containers",
}
REPLACED = {
    "replace_secret_ids": "secret_ids",
    "replace_volume_mounts": "volume_mounts",
    "replace_cloud_bucket_mounts": "cloud_bucket_mounts",
}


def known_function(plane: ControlPlane, identity: str) -> Fn:
    """Return a function by id."""
    fn = plane.fns.get(identity)
    if fn is None:
        raise not_found(f"Function {identity} not found")
    return fn


def _new(plane: ControlPlane, existing: str, app: App, tag: str) -> Fn:
    """Return the function to define; one of a published version stays as it is."""
    fn = plane.fns.get(existing)
    if fn is None or fn.version:
        fn = Fn(new_id("fu"), app, tag)
        plane.fns[fn.id] = fn
        app.functions.append(fn)
    return fn


@unary("FunctionPrecreate")
async def _precreate(peer: Peer, request: Any) -> Any:
    app = known_app(peer.plane, request.app_id)
    fn = _new(peer.plane, request.existing_function_id, app, request.function_name)
    definition = pb.Function(
        function_type=request.function_type,
        function_schema=request.function_schema,
        supported_input_formats=request.supported_input_formats,
        supported_output_formats=request.supported_output_formats,
    )
    for name, method in request.method_definitions.items():
        definition.method_definitions[name].CopyFrom(method)
    fn.meta = function_metadata(fn, definition)
    return pb.FunctionPrecreateResponse(function_id=fn.id, handle_metadata=fn.meta)


@unary("FunctionCreate")
async def _create(peer: Peer, request: Any) -> Any:
    app, ranked = known_app(peer.plane, request.app_id), request.HasField("function_data")
    # A list of GPU types arrives as ranked functions: the first choice is always available.
    definition = request.function_data.ranked_functions[0].function if ranked else request.function
    tag = definition.function_name or request.function_data.function_name
    fn = _new(peer.plane, request.existing_function_id, app, tag)
    fn.definition = definition
    fn.data = request.function_data if ranked else _data_of(definition)
    if fn.definition.is_server:
        await ensure_url(peer.plane, fn)
    fn.meta = function_metadata(fn, fn.definition)
    return pb.FunctionCreateResponse(
        function_id=fn.id, function=definition, handle_metadata=fn.meta, function_data=fn.data
    )


def _data_of(definition: Any) -> Any:
    """Return a function with one choice of hardware in the form that the client reads."""
    data = pb.FunctionData()
    names = {field.name for field in pb.FunctionData.DESCRIPTOR.fields}
    for field, value in definition.ListFields():
        if field.name not in names:
            continue
        target = getattr(data, field.name)
        if isinstance(target, Message):
            target.CopyFrom(value)
        elif hasattr(target, "MergeFrom"):
            target.MergeFrom(value)
        else:
            setattr(data, field.name, value)
    data.ranked_functions.add(rank=0, function=definition)
    return data


def _lookup(peer: Peer, request: Any, kind: str) -> str:
    """Return the id that a name has in the current version of an app, or in the one asked for."""
    environment, tag = environment_of(request), request.object_tag
    app = peer.plane.deployed.get((environment, request.app_name))
    if app is None or app.done:
        raise not_found(f"App '{request.app_name}' not found in environment '{environment}'")
    number = request.app_version or app.version
    version = app.versions.get(number)
    if version is None:
        raise not_found(f"App '{request.app_name}' has no version {number}")
    ids = version.class_ids if kind == "class" else version.function_ids
    if tag not in ids:
        raise not_found(f"App '{request.app_name}' has no {kind} '{tag}'")
    return ids[tag]


@unary("FunctionGet")
async def _get(peer: Peer, request: Any) -> Any:
    fn = peer.plane.fns[_lookup(peer, request, "function")]
    return pb.FunctionGetResponse(function_id=fn.id, handle_metadata=fn.meta, function=fn.data)


@unary("FunctionGetById")
async def _get_by_id(peer: Peer, request: Any) -> Any:
    fn = known_function(peer.plane, request.function_id)
    return pb.FunctionGetByIdResponse(function=fn.data, handle_metadata=fn.meta)


@unary("ClassCreate")
async def _class_create(peer: Peer, request: Any) -> Any:
    app, identity = known_app(peer.plane, request.app_id), request.existing_class_id
    if app.classes.get(identity) != 0:
        identity = new_id("cs")
        app.classes[identity] = 0
    return pb.ClassCreateResponse(class_id=identity, handle_metadata=pb.ClassHandleMetadata())


@unary("ClassGet")
async def _class_get(peer: Peer, request: Any) -> Any:
    identity = _lookup(peer, request, "class")
    return pb.ClassGetResponse(class_id=identity, handle_metadata=pb.ClassHandleMetadata())


def _with_options(base: Any, options: Any) -> Any:
    """Return a copy of a definition with the options of `with_options` and its kin."""
    definition = pb.Function()
    definition.CopyFrom(base)
    if options.HasField("resources"):
        definition.resources.MergeFrom(options.resources)
    if options.HasField("retry_policy"):
        definition.retry_policy.CopyFrom(options.retry_policy)
    if options.HasField("scheduler_placement"):
        definition.scheduler_placement.CopyFrom(options.scheduler_placement)
    for flag, name in REPLACED.items():
        if getattr(options, flag):
            definition.ClearField(name)  # type: ignore[arg-type]
            getattr(definition, name).extend(getattr(options, name))
    for source, target in PLAIN.items():
        if options.HasField(source):
            setattr(definition, target, getattr(options, source))
    for source, target in AUTOSCALED.items():
        if options.HasField(source):
            setattr(definition.autoscaler_settings, target, getattr(options, source))
    return definition


@unary("FunctionBindParams")
async def _bind(peer: Peer, request: Any) -> Any:
    plane, key = peer.plane, request.SerializeToString(deterministic=True)
    if key not in plane.bound:
        base = known_function(plane, request.function_id)
        definition = base.definition
        if request.HasField("function_options"):
            definition = _with_options(definition, request.function_options)
        fn = Fn(new_id("fu"), base.app, base.tag, definition)
        fn.data, fn.params = base.data, request.serialized_params
        fn.base, fn.version = base.id, base.version
        fn.meta = function_metadata(fn, definition)
        plane.fns[fn.id] = fn
        base.app.functions.append(fn)
        plane.bound[key] = fn.id
    fn = plane.fns[plane.bound[key]]
    return pb.FunctionBindParamsResponse(bound_function_id=fn.id, handle_metadata=fn.meta)


def _settings(fn: Fn) -> Any:
    settings = pb.AutoscalerSettings()
    settings.CopyFrom(fn.definition.autoscaler_settings)
    for name, value in fn.autoscaler.items():
        setattr(settings, name, value)
    return settings


@unary("FunctionUpdateSchedulingParams")
async def _update_autoscaler(peer: Peer, request: Any) -> Any:
    fn = known_function(peer.plane, request.function_id)
    for field, value in request.settings.ListFields():
        fn.autoscaler[field.name] = value
    reconcile(peer.plane, fn)
    return pb.FunctionUpdateSchedulingParamsResponse(current_settings=_settings(fn))


@unary("FunctionGetSchedulingParams")
async def _get_autoscaler(peer: Peer, request: Any) -> Any:
    fn = known_function(peer.plane, request.function_id)
    configuration = pb.AutoscalerConfiguration(
        settings=_settings(fn), static_settings=fn.definition.autoscaler_settings
    )
    return pb.FunctionGetSchedulingParamsResponse(autoscaler_configuration=configuration)


@unary("FunctionGetCurrentStats")
async def _stats(peer: Peer, request: Any) -> Any:
    fn = known_function(peer.plane, request.function_id)
    return pb.FunctionStats(
        backlog=len(fn.queue),
        num_total_tasks=len(fn.tasks),
        num_running_inputs=sum(len(task.running) for task in fn.tasks.values()),
    )
