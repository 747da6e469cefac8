"""What a container is told about its app: it resolves all handles of the program from this."""

from __future__ import annotations

from typing import Any

from modal_proto import api_pb2 as pb

from .state import App, ControlPlane, Fn, Task


def app_layout(app: App, version: int) -> Any:
    """Return the functions and classes of one version of an app (0: not published yet)."""
    layout = pb.AppLayout()
    published = app.versions.get(version)
    if published is not None:
        function_ids, class_ids = published.function_ids, published.class_ids
    else:
        function_ids, class_ids = app.function_ids, app.class_ids
    layout.function_ids.update(function_ids)
    layout.class_ids.update(class_ids)
    functions = [fn for fn in app.functions if not fn.base and fn.version == version]
    for fn in functions:
        layout.objects.add(object_id=fn.id, function_handle_metadata=fn.meta)
        if fn.tag not in layout.function_ids:
            layout.function_ids[fn.tag] = fn.id
    classes = [identity for identity, number in app.classes.items() if number == version]
    for identity in classes:
        layout.objects.add(object_id=identity).class_handle_metadata.SetInParent()
    if not class_ids:
        # The container started before the app was published: classes and their service
        # functions were created in the same order.
        services = [fn.tag.removesuffix(".*") for fn in functions if fn.tag.endswith(".*")]
        layout.class_ids.update(zip(services, classes, strict=False))
    return layout


def container_arguments(plane: ControlPlane, task: Task) -> Any:
    """Return what the entry point of the container reads first."""
    fn, app, definition = task.fn, task.fn.app, task.fn.definition
    layout = app_layout(app, fn.version)
    known = {item.object_id for item in layout.objects}
    if fn.id not in known:
        layout.objects.add(object_id=fn.id, function_handle_metadata=fn.meta)
        known.add(fn.id)
    for dependency in definition.object_dependencies:
        if dependency.object_id not in known:
            known.add(dependency.object_id)
            _add_dependency(plane, layout, dependency.object_id)
    if fn.base:  # the entry point looks a variant up under the tag of its base
        layout.function_ids[fn.tag] = fn.id
    return pb.ContainerArguments(
        task_id=task.id,
        function_id=fn.id,
        app_id=app.id,
        function_def=definition,
        serialized_params=fn.params,
        environment_name=app.env,
        app_layout=layout,
    )


def _add_dependency(plane: ControlPlane, layout: Any, identity: str) -> None:
    item = layout.objects.add(object_id=identity)
    if identity in plane.volumes:
        volume = plane.volumes[identity]
        item.volume_metadata.CopyFrom(volume_metadata(volume))
    elif identity in plane.mounts:
        item.mount_handle_metadata.SetInParent()
    elif identity in plane.fns:
        item.function_handle_metadata.CopyFrom(plane.fns[identity].meta)


def volume_metadata(volume: Any) -> Any:
    """Return what the client keeps of a volume."""
    return pb.VolumeMetadata(
        version=volume.version,
        name=volume.name,
        creation_info=pb.CreationInfo(created_at=volume.created, created_by="local"),
    )


def function_metadata(fn: Fn, definition: Any) -> Any:
    """Return what the client keeps of a function."""
    meta = pb.FunctionHandleMetadata(
        function_name=fn.tag,
        function_type=definition.function_type,
        is_method=definition.is_method,
        definition_id=f"de-{fn.id[3:]}",
        class_parameter_info=definition.class_parameter_info,
        function_schema=definition.function_schema,
        supported_input_formats=definition.supported_input_formats,
        supported_output_formats=definition.supported_output_formats,
        base_function_id=fn.base,
        _experimental_flash_urls=[fn.url] if fn.url else [],
        app_id=fn.app.id,
    )
    for name, method in definition.method_definitions.items():
        meta.method_handle_metadata[name].CopyFrom(
            pb.FunctionHandleMetadata(
                function_name=method.function_name,
                function_type=method.function_type,
                is_method=True,
                use_method_name=name,
                function_schema=method.function_schema,
                supported_input_formats=method.supported_input_formats,
                supported_output_formats=method.supported_output_formats,
                app_id=fn.app.id,
            )
        )
    return meta
