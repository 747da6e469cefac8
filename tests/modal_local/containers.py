"""How a container starts, is signalled, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import forks
from .image_lint import image_packages
from .layouts import container_arguments
from .logs import STDERR, STDOUT, write_log
from .objects import image_environment
from .rpc import Listener, servicer
from .state import ControlPlane, Task
from .volumes import VolumeFullError

ISOLATION = Path(__file__).with_name("isolation.py")
RUNTIME = "/run/modal"  # where a container finds its socket and arguments
WORKDIR = "__WORKDIR__"
MAX_LINE = 1 << 20


async def run(plane: ControlPlane, task: Task) -> int:
    """Run one container to its end and return its exit status."""
    status = 255
    sockets = plane.run_dir / task.id[-6:]
    try:
        while plane.down_until > time.time():
            await asyncio.sleep(0.05)
        task.dir.mkdir(parents=True)
        sockets.mkdir()
        task.listener = Listener(servicer(plane, task), path=str(sockets / "api.sock"))
        await task.listener.start()
        (sockets / "args.bin").write_bytes(container_arguments(plane, task).SerializeToString())
        await asyncio.to_thread(_check_out, plane, task)
        if plane.isolation == "plain":
            await _start_plain(plane, task, sockets)
        else:
            await _start_isolated(plane, task, sockets)
        status = await _follow(plane, task)
    except Exception as error:
        text = f"modal_local: container failed to start: {error!r}\n"
        write_log(task.fn.app, text, task, STDERR)
        _echo(plane, task, text)
    finally:
        kill(plane, task)
        if task.listener is not None:
            task.listener.stop()
        if task.http is not None:
            await task.http.close()
        for link in task.links:
            _unlink(plane, task, link)
        clean = status == 0 and not task.killing
        for checkouts in task.checkouts.values():
            for checkout in checkouts:
                checkout.release(clean)
        shutil.rmtree(task.dir, ignore_errors=True)
        shutil.rmtree(sockets, ignore_errors=True)
    return status


async def _follow(plane: ControlPlane, task: Task) -> int:
    process = task.process
    assert process is not None
    assert process.stdout is not None
    assert process.stderr is not None
    task.idle_since = time.time()
    commits = plane.spawn(_background_commits(plane, task))
    try:
        await asyncio.gather(
            _pump(plane, task, process.stdout, STDOUT),
            _pump(plane, task, process.stderr, STDERR),
        )
        return await process.wait()
    finally:
        commits.cancel()


async def _pump(
    plane: ControlPlane, task: Task, stream: asyncio.StreamReader, descriptor: int
) -> None:
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            line = error.partial
        except asyncio.LimitOverrunError as error:
            line = await stream.readexactly(error.consumed)
        if not line:
            return
        text = line.decode(errors="replace")
        write_log(task.fn.app, text, task, descriptor)
        _echo(plane, task, text)


def _echo(plane: ControlPlane, task: Task, text: str) -> None:
    if plane.options.verbose:
        sys.stderr.write(f"[{task.fn.tag} {task.id[-4:]}] {text}")


async def _background_commits(plane: ControlPlane, task: Task) -> None:
    while task.checkouts:
        await asyncio.sleep(plane.options.background_commit)
        for checkouts in task.checkouts.values():
            for checkout in checkouts:
                if checkout.read_only:
                    continue
                try:
                    await asyncio.to_thread(checkout.commit)
                except VolumeFullError as error:
                    write_log(task.fn.app, f"modal_local: background commit: {error}\n", task)


def _check_out(plane: ControlPlane, task: Task) -> None:
    for number, mount in enumerate(task.fn.definition.volume_mounts):
        volume = plane.volumes[mount.volume_id]
        task.mount_paths.setdefault(volume.id, []).append(mount.mount_path.rstrip("/"))
        if plane.isolation != "plain":
            folder = plane.dir / "copies" / f"{task.id}-{number}"
            checkout = volume.checkout(mount.sub_path, folder)
            checkout.read_only = mount.read_only
            task.checkouts.setdefault(volume.id, []).append(checkout)


def _environment(plane: ControlPlane, task: Task, runtime: str) -> dict[str, str]:
    definition, gpu = task.fn.definition, task.fn.definition.resources.gpu_config
    environment = image_environment(plane, definition.image_id)
    for identity in definition.secret_ids:
        if identity in plane.secrets:
            environment.update(plane.secrets[identity].env)
    environment.setdefault("PYTHONPATH", "/root")
    environment |= {
        "PATH": f"{os.path.dirname(sys.executable)}:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "MODAL_IS_REMOTE": "1",
        "MODAL_SERVER_URL": f"unix://{runtime}/api.sock",
        "MODAL_TASK_ID": task.id,
        "MODAL_CONTAINER_ARGUMENTS_PATH": f"{runtime}/args.bin",
        "MODAL_IMAGE_ID": definition.image_id,
        "MODAL_ENVIRONMENT": task.fn.app.env,
        "MODAL_REGION": "local",
        "MODAL_CLOUD_PROVIDER": "LOCAL",
        "MODAL_HEARTBEAT_INTERVAL": str(plane.options.heartbeat),
        **plane.options.container_env,
    }
    if gpu.count:
        environment["MODAL_LOCAL_GPU"] = f"{gpu.gpu_type}:{gpu.count}"
    return environment


def _mounted_files(plane: ControlPlane, task: Task) -> list[tuple[str, str, int]]:
    return [
        (str(plane.cas / file.sha256_hex), "/" + file.filename.lstrip("/"), file.mode or 0o644)
        for identity in task.fn.definition.mount_ids
        for file in plane.mounts.get(identity, ())
    ]


async def _start_isolated(plane: ControlPlane, task: Task, sockets: Path) -> None:
    definition = task.fn.definition
    environment = _environment(plane, task, RUNTIME)
    writable: list[tuple[str, str]] = [(path, path) for path in plane.options.share]
    readonly: list[tuple[str, str]] = [(str(sockets), RUNTIME)]
    taken: dict[str, int] = {}
    for mount in definition.volume_mounts:
        checkout = task.checkouts[mount.volume_id][taken.get(mount.volume_id, 0)]
        taken[mount.volume_id] = taken.get(mount.volume_id, 0) + 1
        pair = (str(checkout.work), mount.mount_path.rstrip("/"))
        (readonly if mount.read_only else writable).append(pair)
    spec: dict[str, Any] = {
        "root": str(task.dir),
        "prefixes": [sys.prefix, sys.base_prefix],
        "files": _mounted_files(plane, task),
        "writable": writable,
        "readonly": readonly,
        "cwd": environment.pop(WORKDIR, "/root"),
        "argv": [sys.executable, "-m", "modal._container_entrypoint"],
    }
    if definition.is_server:
        task.http_socket = str(sockets / "http.sock")
        spec["forward"] = [task.http_socket, definition.http_config.port or 8000]
    (sockets / "spec.json").write_text(json.dumps(spec))
    torch = "torch" in image_packages(plane, definition.image_id)
    forking = plane.options.torch_forks if torch else plane.options.forks
    if forking and not plane.cold and not definition.is_server:
        order = {"spec": str(sockets / "spec.json"), "words": spec["argv"][1:], "env": environment}
        task.process = await forks.start(forking, order, MAX_LINE)
    plane.containers_forked += task.process is not None
    if task.process is None:
        argv = isolated(str(sockets / "spec.json"), network=not definition.is_server)
        task.process = await _spawn(argv, environment, "/")


def isolated(spec: str, *, network: bool) -> list[str]:
    """Return the command that runs a specification in namespaces of its own."""
    flags = ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"]
    if not network:
        flags.append("--net")
    return ["unshare", *flags, sys.executable, "-I", "-S", str(ISOLATION), spec]


async def _start_plain(plane: ControlPlane, task: Task, sockets: Path) -> None:
    root = task.dir / "root"
    for source, target, mode in _mounted_files(plane, task):
        path = task.dir / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        path.chmod(mode & 0o777)
    root.mkdir(exist_ok=True)
    for mount in task.fn.definition.volume_mounts:
        _link(plane, task, mount)
    environment = _environment(plane, task, str(sockets))
    environment.pop(WORKDIR, None)
    environment["PYTHONPATH"] = str(root)
    argv = [sys.executable, "-m", "modal._container_entrypoint"]
    task.process = await _spawn(argv, environment, str(root))


def _link(plane: ControlPlane, task: Task, mount: Any) -> None:
    """Make a volume visible without namespaces: a link, which needs rights at its place."""
    link = Path(mount.mount_path.rstrip("/"))
    folder = plane.volumes[mount.volume_id].path(mount.sub_path)
    folder.mkdir(parents=True, exist_ok=True)
    if not (link.is_symlink() and link.readlink() == folder):
        for parent in reversed(link.parents):
            if not parent.exists():
                parent.mkdir()
                task.links.append(parent)
        link.symlink_to(folder)
    task.links.append(link)


def _unlink(plane: ControlPlane, task: Task, path: Path) -> None:
    others = [other for other in plane.tasks.values() if other is not task]
    if any(path in other.links for other in others):
        return
    if path.is_symlink():
        path.unlink()
    for parent in [path, *path.parents]:
        if parent in task.links and parent.is_dir():
            with contextlib.suppress(OSError):
                parent.rmdir()


async def _spawn(
    argv: list[str], environment: dict[str, str], cwd: str
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *argv,
        cwd=cwd,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        limit=MAX_LINE,
        start_new_session=True,
    )


def send_signal(
    plane: ControlPlane, task: Task, number: signal.Signals, group: bool = False
) -> None:
    """Signal the main process of a container, or all of its processes."""
    process = task.process
    if process is None or process.returncode is not None:
        return
    if plane.isolation == "plain":
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(process.pid, number)
    elif process.stdin is not None and not process.stdin.is_closing():
        # The init of the container passes it on: only it knows the main process.
        process.stdin.write(f"{int(number)} {'group' if group else 'main'}\n".encode())


def kill(plane: ControlPlane, task: Task) -> None:
    """Kill every process of a container; with namespaces none can escape."""
    process = task.process
    if process is None or process.returncode is not None:
        return
    task.killing = True
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(number) for number in file.read().split()]
    except OSError:
        return []


def main_pid(plane: ControlPlane, task: Task) -> int | None:
    """Return the host's number of the process that runs the functions."""
    if task.process is None:
        return None
    if plane.isolation == "plain":
        return task.process.pid
    # unshare -> init -> (forwarder of a server,) main process
    inner = [pid for init in children(task.process.pid) for pid in children(init)]
    return inner[-1] if inner else None


def processes(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found, pending = [], [pid]
    while pending:
        pid = pending.pop()
        found.append(pid)
        pending += children(pid)
    return found


def open_files(task: Task, volume_id: str) -> list[str]:
    """Return the files of a volume that processes of its container hold open."""
    if task.process is None:
        return []
    hits, paths = [], set(task.mount_paths.get(volume_id, ()))
    for pid in processes(task.process.pid)[2:]:
        try:
            mounts = _mounts(pid, paths)
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if _mount_id(pid, number) in mounts:
                        hits.append(os.readlink(f"/proc/{pid}/fd/{number}"))
        except OSError:
            continue
    return hits


def _mounts(pid: int, paths: set[str]) -> set[str]:
    with open(f"/proc/{pid}/mountinfo") as file:
        rows = [line.split(" ", 5) for line in file]
    return {row[0] for row in rows if row[4] in paths}


def _mount_id(pid: int, number: str) -> str:
    with open(f"/proc/{pid}/fdinfo/{number}") as file:
        for line in file:
            if line.startswith("mnt_id:"):
                return line.split()[1]
    return ""
