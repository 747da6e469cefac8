"""Containers of the local Modal, and the job servers in them, as forks of one process.

What that process has imported comes from the interpreter's own folders, which a container sees as
they are here; nothing of this repository, so a container's code is what is mounted in it. While it
imports, it notes which variables of the environment are read: a container for which one of them is
another starts cold.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from modal_local import isolation
from warm_programs import SPARED, program

ENVIRONMENT = {
    "HOME": "/root", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", "MODAL_IS_REMOTE": "1",
    "MODAL_HEARTBEAT_INTERVAL": "2.0", "OMP_NUM_THREADS": "1",
    "PATH": f"{os.path.dirname(sys.executable)}:/usr/local/bin:/usr/bin:/bin",
}  # fmt: skip
"""Of the forking process: what every container of the tests has."""
THE_DEFAULT = {"HF_HOME": "/root/.cache/huggingface"}
"""Values that say what is so without them."""
BY_LIBRARIES = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "LD_", "LC_", "LANG", "TZ", "MALLOC_", "GLIBC_",
    "PYTHON",
)  # fmt: skip
"""How variables begin that no Python code reads, but what it loads, or Python itself."""
OWN = ("PYTHONPATH",)
"""Variables that a fork heeds by itself."""
KINDS = {
    "containers": (
        "hydra", "hydra._internal.hydra", "hydra._internal.config_loader_impl", "cloudpickle",
        "numpy", "modal._container_entrypoint",
    ),
    "torch-containers": tuple(
        f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3")
    ),
}  # fmt: skip
"""What the forking processes have imported: the second what the first has, too."""
JOB_SERVER = "modal_sweep/container/zygote.py"
"""A container that has this file may start a job server."""
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 1 << 28, 1 << 29
read: set[str] = set()


class Noting(type(os.environ)):  # type: ignore[misc]
    """An environment that notes what is read of it."""

    def __getitem__(self, name: str) -> str:
        read.add(name)
        return str(super().__getitem__(name))


def preload(kind: str) -> None:
    """Import what containers of a kind import; no thread may be left, which a fork would lose."""
    sys.path.remove(str(Path(__file__).parent))
    plain, os.environ.__class__ = os.environ.__class__, Noting
    names = [*KINDS["containers"], *(KINDS[kind] if kind != "containers" else ())]
    for name in names:
        importlib.import_module(name)
    os.environ.__class__ = plain
    del sys.modules["modal._container_entrypoint"]  # it is run as a program
    places = (sys.prefix, sys.base_prefix, os.path.dirname(__file__))
    strange = {
        name: file
        for name, module in sys.modules.items()
        if (file := getattr(module, "__file__", None) or "")[:1] == "/"
        and not file.startswith(places)
    }
    assert not strange, f"not of the interpreter's folders: {strange}"
    assert len(os.listdir("/proc/self/task")) == 1, "what was imported has started threads"
    gc.collect()
    gc.freeze()  # no fork looks through what is imported, or copies its pages by that


def forget_tests() -> None:
    """Forget the modules of the tests: a container does not see them."""
    here = os.path.dirname(__file__)
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(here) and name != "__main__":
            del sys.modules[name]
    sys.path_importer_cache.clear()  # of folders as they are out here


def alike(environment: dict[str, str]) -> bool:
    """Whether a process with this environment would have imported the same."""
    names = {*environment, *ENVIRONMENT}
    early = read | {name for name in names if name.startswith(BY_LIBRARIES)}
    without = {name: THE_DEFAULT.get(name) for name in early}
    return all(
        environment.get(name, without[name]) == ENVIRONMENT.get(name, without[name])
        for name in early - {*OWN}
    )


def unshare(more: int = 0) -> None:
    """Be root in a user namespace with mounts of its own, as `unshare --map-root-user --mount`."""
    user, group = os.geteuid(), os.getegid()
    if isolation.libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | more):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def wait_as_unshare(init: int) -> None:
    """End as the container's first process ends."""
    code = os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def job_server(order: dict[str, Any], spec: dict[str, Any]) -> socket.socket | None:
    """What the container's job server will listen at, if its code has one, and the program that its
    main process counts as Python."""
    files = [target for _, target, _ in spec["files"]]
    if not any(target.endswith(f"/{JOB_SERVER}") for target in files):
        return None
    folder = os.path.dirname(order["spec"])
    inside = dict(spec["readonly"])[folder]
    begins = JOB_SERVER.removesuffix(".py").replace("/", ".")
    program(f"{folder}/python", SPARED, begins=begins, addresses=[f"{inside}/spare"])
    order["python"] = f"{inside}/python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/spare")
    listener.listen()
    return listener


def contain(order: dict[str, Any]) -> socket.socket | None:
    """Be the main process of a container: only that one returns, with its job server's socket."""
    try:
        spec = json.loads(Path(order["spec"]).read_text())
        isolation.libc.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
        unshare(CLONE_NEWPID)  # of what is forked from here
        if init := os.fork():
            wait_as_unshare(init)
        isolation.libc.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
        listener = job_server(order, spec)
        if main := isolation.begin(spec):
            if listener:
                listener.close()
            isolation.guard(main)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    order["cwd"] = spec["cwd"]
    forget_tests()
    if random := sys.modules.get("numpy.random"):
        random.seed()  # as numpy does when it is imported; Python's own does it in every fork
    return listener
