"""Start and stop of a control plane."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys

from aiohttp import web

# Imported for the procedures they register.
from . import (  # noqa: F401
    admin,
    apps,
    blobs,
    calls,
    container_rpcs,
    functions,
    keyvalue,
    logs,
    objects,
    volume_rpcs,
)
from .containers import isolated, kill
from .options import Options
from .rpc import Listener, servicer
from .scheduling import watch
from .state import ControlPlane

MAX_BODY = 4 << 30
PROBE_TIMEOUT = 20
# Clients that hang up in the middle of a call are normal here.
logging.getLogger("grpclib.server").setLevel(logging.CRITICAL)


def probe_isolation(plane: ControlPlane) -> str:
    """Return why containers cannot be isolated here; empty when they can."""
    spec = plane.dir / "probe.json"
    root = plane.dir / "probe"
    root.mkdir(exist_ok=True)
    content = {
        "root": str(root),
        "prefixes": [sys.prefix, sys.base_prefix],
        "files": [],
        "writable": [],
        "readonly": [],
        "cwd": "/root",
        "argv": [sys.executable, "-I", "-S", "-c", "open('/tmp/x', 'w')"],
    }
    spec.write_text(json.dumps(content))
    reading, writing = os.pipe()  # the container dies at the end of its input
    try:
        done = subprocess.run(
            isolated(str(spec), network=True),
            stdin=reading,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        os.close(reading)
        os.close(writing)
        spec.unlink()
        root.rmdir()
    return "" if done.returncode == 0 else done.stderr.strip()[-300:] or "unshare failed"


def _choose_isolation(plane: ControlPlane) -> None:
    wanted = plane.options.isolation
    if wanted == "plain":
        plane.isolation_reason = "asked for"
        return
    plane.isolation_reason = probe_isolation(plane)
    if not plane.isolation_reason:
        plane.isolation = "namespaces"
    elif wanted == "namespaces":
        raise RuntimeError(f"containers cannot be isolated: {plane.isolation_reason}")
    else:
        sys.stderr.write(f"modal_local: isolation is plain: {plane.isolation_reason}\n")


async def start(options: Options) -> ControlPlane:
    """Start a control plane."""
    plane = ControlPlane(options)
    try:
        await asyncio.to_thread(_choose_isolation, plane)
        http = web.Application(client_max_size=MAX_BODY)
        http.add_routes(blobs.routes(plane))
        http.add_routes([*admin.read_routes(plane), *admin.fault_routes(plane)])
        runner = web.AppRunner(http, access_log=None)
        await runner.setup()
        plane.runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        plane.http_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        plane.listener = Listener(servicer(plane, None), port=options.port)
        await plane.listener.start()
    except BaseException:
        await stop(plane)
        raise
    plane.spawn(watch(plane))
    return plane


def client_environment(plane: ControlPlane) -> dict[str, str]:
    """Return the variables with which a client finds this control plane."""
    return {
        "MODAL_SERVER_URL": f"http://127.0.0.1:{plane.listener.port}",
        "MODAL_TOKEN_ID": "ak-local",
        "MODAL_TOKEN_SECRET": "as-local",
        "MODAL_CONFIG_PATH": str(plane.dir / "no-such-config.toml"),
        "MODAL_LOCAL_ADMIN": plane.http_url,
    }


async def stop(plane: ControlPlane) -> None:
    """Kill all containers and remove every trace of them."""
    plane.stopping = True
    tasks = list(plane.tasks.values())
    for task in tasks:
        kill(plane, task)
    end = asyncio.get_running_loop().time() + 5
    while plane.tasks and asyncio.get_running_loop().time() < end:
        for task in list(plane.tasks.values()):
            kill(plane, task)
        await asyncio.sleep(0.02)
    for job in list(plane.background):
        job.cancel()
    await asyncio.gather(*plane.background, return_exceptions=True)
    if plane.listener is not None:
        plane.listener.stop()
    for runner in plane.runners:
        await runner.cleanup()
    shutil.rmtree(plane.run_dir, ignore_errors=True)
    for folder in [plane.dir] if plane.own_dir else [plane.dir / "tasks", plane.dir / "copies"]:
        shutil.rmtree(folder, ignore_errors=True)
