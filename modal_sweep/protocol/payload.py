"""What all jobs of a launch share: Hydra's context, the task, the state of its singletons.

Hydra's ConfigStore holds every schema that anything in the launching process has registered, and
most objects lead to it. It is pickled by itself, and so is every singleton and resolver: one that
is made of modules that are not in the image must not keep a job from starting. What pickle cannot
take is named before anything is rented: it is something of the app's, not of the launcher's.
"""

import contextlib
import io
import pickle
import zlib
from types import CodeType, FunctionType
from typing import Any

import cloudpickle
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from modal_sweep.errors import LaunchError


class Packer(cloudpickle.Pickler):
    """Leaves the ConfigStore out: whoever refers to it gets the one that is there."""

    def reducer_override(self, obj: Any) -> Any:
        """How an object is pickled."""
        if isinstance(obj, ConfigStore):
            return ConfigStore.instance, ()
        return super().reducer_override(obj)


def dumps(content: Any) -> bytes:
    """Pickle by value what cannot be imported in the container."""
    buffer = io.BytesIO()
    Packer(buffer).dump(content)
    return buffer.getvalue()


def pack_config(config: DictConfig) -> bytes:
    """A job's configuration with its types, compressed."""
    return zlib.compress(cloudpickle.dumps(config))


def unpack_config(packed: bytes) -> DictConfig:
    """What `pack_config` was given."""
    config: DictConfig = pickle.loads(zlib.decompress(packed))
    return config


def sendable(what: str, function: Any, content: Any) -> bytes:
    """`dumps` of what a function of the app belongs to.

    Raises:
        LaunchError: pickle cannot take it; says `what` it is, and which global the function reads.
    """
    try:
        return dumps(content)
    except Exception as error:
        name = culprit(function, set())
        remedy = "; make it inside the function, or keep it in a module that is imported"
        raise LaunchError(
            f"{what}{f' reads {name}, which' * bool(name)} cannot be sent to Modal ({error})"
            + remedy * bool(name)
        ) from None


def culprit(function: Any, known: set[str]) -> str:
    """The global, or the variable of an enclosing function, that pickle cannot take.

    Looked for in what a function reads, and in what the functions read that it calls; "" when it is
    none of these.
    """
    if not isinstance(function, FunctionType):
        return ""
    values = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # empty until the function around it assigns it
            values[name] = cell.cell_contents
    for name in names_in(function.__code__):
        if name in values and name not in known:
            known.add(name)
            try:
                dumps(values[name])
            except Exception:
                return culprit(values[name], known) or f"{function.__module__}.{name}"
    return ""


def names_in(code: CodeType) -> list[str]:
    """Names that a function, and what is defined in it, reads."""
    parts = [part for part in code.co_consts if isinstance(part, CodeType)]
    return [*code.co_freevars, *code.co_names, *(n for part in parts for n in names_in(part))]


def pack(context: HydraContext, task_function: TaskFunction) -> bytes:
    """The common part of a launch, compressed.

    Raises:
        LaunchError: pickle cannot take the task, or a resolver; names the global that it holds.
    """
    state = Singleton.get_state()
    state["instances"].pop(HydraConfig, None)  # every job sets its own
    store = state["instances"].pop(ConfigStore, None)
    instances = {kind: dumps(instance) for kind, instance in state["instances"].items()}
    instances[ConfigStore] = cloudpickle.dumps(store)
    resolvers = {
        name: sendable(f"the resolver {name}", resolve, resolve)
        for name, resolve in state["omegaconf_resolvers"].items()
    }
    name = f"{task_function.__module__}.{getattr(task_function, '__qualname__', '')}"
    main_part = sendable(f"the task {name}", task_function, (context, task_function))
    shared = (instances, resolvers, main_part)
    return zlib.compress(cloudpickle.dumps(shared))


def unpack(packed: bytes) -> tuple[HydraContext, TaskFunction]:
    """Restore the singletons in this process; context and task."""
    instances, resolvers, main_part = pickle.loads(zlib.decompress(packed))
    setup_globals()
    plugins = Plugins.instance()  # scanned before the fork
    store = {ConfigStore: instances.pop(ConfigStore)}
    Singleton._instances.update(loaded(store))
    Singleton.set_state(
        {
            "instances": {**Singleton._instances, **loaded(instances), Plugins: plugins},
            "omegaconf_resolvers": {name: resolver(name, data) for name, data in resolvers.items()},
        }
    )
    context, task_function = pickle.loads(main_part)
    return context, task_function


def freeze_environment(values: dict[str, str | None]) -> None:
    """Let `${oc.env:...}` of these variables be what it was when the job was launched.

    Args:
        values: by variable; None: it was not set, so the default counts.
    """

    def env(name: str, *default: Any) -> str | None:
        value = values.get(name)
        return oc.env("" if name in values else name, *default) if value is None else value

    OmegaConf.register_new_resolver("oc.env", env, replace=True)


def loaded(instances: dict[Any, bytes]) -> dict[Any, Any]:
    """Singletons, without those that are made of modules that are not here."""
    singletons = {}
    for kind, data in instances.items():
        with contextlib.suppress(ImportError):
            singletons[kind] = pickle.loads(data)
    return singletons


def resolver(name: str, data: bytes) -> Any:
    """A resolver of the launching process; one that cannot be loaded here says so when used."""
    try:
        return pickle.loads(data)
    except ImportError as error:
        problem = f"the resolver {name} is not in the image: {error}"

        def missing(*arguments: Any) -> Any:
            raise ImportError(problem)

        return missing
