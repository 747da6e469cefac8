"""What the control plane knows, all of it in memory."""

from __future__ import annotations

import asyncio
import collections
import itertools
import os
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modal_proto import api_pb2 as pb

from .forks import Forked
from .options import Options
from .volumes import Checkout, Volume

Result = pb.GenericResult
SUCCESS = Result.GENERIC_STATUS_SUCCESS
FAILURE = Result.GENERIC_STATUS_FAILURE
TERMINATED = Result.GENERIC_STATUS_TERMINATED
TIMEOUT = Result.GENERIC_STATUS_TIMEOUT
INTERNAL = Result.GENERIC_STATUS_INTERNAL_FAILURE
STATUS_NAMES = {
    SUCCESS: "success",
    FAILURE: "failure",
    TERMINATED: "terminated",
    TIMEOUT: "timeout",
    INTERNAL: "internal_failure",
}
MAX_TEMPORARY = 60  # bytes of a temporary folder's path that sockets fit below
_numbers = itertools.count(1)


def new_id(prefix: str) -> str:
    """Return an id of the length that the client's command line recognises."""
    return f"{prefix}-L{next(_numbers):021d}"


class Signal:
    """Wakes those who wait for a change; cheaper than a condition, as there is no lock."""

    def __init__(self) -> None:
        self._waiters: collections.deque[asyncio.Future[None]] = collections.deque()

    async def wait(self, timeout: float) -> bool:
        """Wait for the next change; False when none came in time."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        timer = future.get_loop().call_later(max(timeout, 0), future.cancel)
        try:
            await asyncio.wait([future])
        finally:
            timer.cancel()
            if not future.done():
                future.cancel()
        return not future.cancelled()

    def fire(self, count: int = -1) -> None:
        """Wake `count` waiters, oldest first; -1 wakes all."""
        while self._waiters and count:
            future = self._waiters.popleft()
            if not future.done():
                future.set_result(None)
                count -= 1


@dataclass
class Version:
    """One deployment of an app."""

    number: int
    function_ids: dict[str, str]
    class_ids: dict[str, str]
    deployed_at: float
    tag: str = ""
    client_version: str = ""
    rollback_of: int = 0
    commit: Any = None


@dataclass
class App:
    """An app, ephemeral or deployed."""

    id: str
    name: str
    state: int
    env: str = "main"
    created: float = field(default_factory=time.time)
    stopped: float = 0.0
    version: int = 0
    versions: dict[int, Version] = field(default_factory=dict)
    function_ids: dict[str, str] = field(default_factory=dict)
    class_ids: dict[str, str] = field(default_factory=dict)
    functions: list[Fn] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)  # class id -> version, 0 when unpublished
    tags: dict[str, str] = field(default_factory=dict)
    logs: list[Any] = field(default_factory=list)
    logged: Signal = field(default_factory=Signal)
    done: bool = False
    last_heartbeat: float = field(default_factory=time.time)


@dataclass
class Fn:
    """A function, a class's service function, or a variant of one (parameters, with_options)."""

    id: str
    app: App
    tag: str
    definition: Any = None
    data: Any = None
    params: bytes = b""
    base: str = ""
    version: int = 0  # 0 until the app is published
    meta: Any = field(default_factory=pb.FunctionHandleMetadata)
    queue: collections.deque[Input] = field(default_factory=collections.deque)
    tasks: dict[str, Task] = field(default_factory=dict)
    arrived: Signal = field(default_factory=Signal)
    started: int = 0
    autoscaler: dict[str, Any] = field(default_factory=dict)
    url: str = ""  # servers only
    inflight: collections.Counter[str] = field(default_factory=collections.Counter)
    wanted_at: float = 0.0  # last request that found no container

    def setting(self, name: str, legacy: str = "") -> float:
        """Return a value of the autoscaler, with the field it had before there was one."""
        if self.autoscaler.get(name) is not None:
            return float(self.autoscaler[name])
        if self.definition is None:
            return 0.0
        settings = self.definition.autoscaler_settings
        if self.definition.HasField("autoscaler_settings") and settings.HasField(name):
            return float(getattr(settings, name))
        return float(getattr(self.definition, legacy)) if legacy else 0.0

    @property
    def concurrency(self) -> int:
        """How many inputs one container takes at a time."""
        limits = self.definition.max_concurrent_inputs, self.definition.batch_max_size
        return max(1, *map(int, limits))

    @property
    def gpus(self) -> int:
        """How many GPUs one container holds."""
        return int(self.definition.resources.gpu_config.count) if self.definition else 0

    @property
    def current(self) -> bool:
        """False for functions of a version that has been replaced, and of stopped apps."""
        return not self.app.done and self.version in (0, self.app.version)


@dataclass
class Call:
    """One FunctionCall."""

    id: str
    fn: Fn
    kind: int
    invocation: int
    parent: str = ""
    created: float = field(default_factory=time.time)
    inputs: dict[int, Input] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)  # in which inputs ended
    unfinished: int = 0
    finished: Signal = field(default_factory=Signal)
    data_out: list[Any] = field(default_factory=list)
    data_added: Signal = field(default_factory=Signal)
    expired: bool = False


@dataclass(eq=False)
class Input:
    """One input of a call."""

    id: str
    index: int
    call: Call
    fn: Fn
    message: Any
    attempt: int = 0
    user_retries: int = 0
    crashes: int = 0
    preemptions: int = 0
    starts: int = 0  # how often it was handed to a container
    task: Task | None = None
    started: float = 0.0
    done: bool = False
    timer: asyncio.TimerHandle | None = None


@dataclass(eq=False)
class Task:
    """One container."""

    id: str
    fn: Fn
    dir: Path
    process: asyncio.subprocess.Process | Forked | None = None
    listener: Any = None
    running: dict[str, Input] = field(default_factory=dict)
    checkouts: dict[str, list[Checkout]] = field(default_factory=dict)  # by volume id
    mount_paths: dict[str, list[str]] = field(default_factory=dict)  # of volumes, by volume id
    cancelled: list[str] = field(default_factory=list)
    cancellation: Signal = field(default_factory=Signal)
    preempted: bool = False
    killing: bool = False
    draining: bool = False
    fetched: int = 0
    idle_since: float = field(default_factory=time.time)
    enqueued: float = field(default_factory=time.time)
    init_error: bool = False
    ready: bool = False  # servers only
    http: Any = None
    http_socket: str = ""
    links: list[Path] = field(default_factory=list)  # plain mode only


@dataclass
class Secret:
    """Environment variables under a name, or without one."""

    id: str
    name: str
    env: dict[str, str]
    created: float = field(default_factory=time.time)


@dataclass
class KeyValue:
    """A Dict (`items`) or a Queue (`partitions`)."""

    id: str
    name: str
    items: dict[bytes, bytes] = field(default_factory=dict)
    partitions: dict[bytes, list[bytes]] = field(default_factory=dict)
    offset: dict[bytes, int] = field(default_factory=dict)  # entries taken per partition
    changed: Signal = field(default_factory=Signal)
    created: float = field(default_factory=time.time)


@dataclass
class Fault:
    """An answer that is delayed (`status` None) or refused, `count` times."""

    rpc: str  # empty: any
    count: int
    seconds: float = 0.0
    status: Any = None


class ControlPlane:
    """Every table; modules add behaviour as functions that take it first."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.own_dir = not options.state_dir
        self.dir = Path(options.state_dir or tempfile.mkdtemp(prefix="modal-local-")).absolute()
        # Socket paths may hold 107 bytes at most, so they do not go below `dir`.
        short = None if len(tempfile.gettempdir()) <= MAX_TEMPORARY else "/tmp"
        self.run_dir = Path(tempfile.mkdtemp(prefix="ml-", dir=short))
        self.cas = self.dir / "cas"
        self.cas.mkdir(parents=True, exist_ok=True)
        self.isolation = "plain"
        self.isolation_reason = ""
        self.http_url = ""
        self.listener: Any = None
        self.runners: list[Any] = []  # of HTTP sites
        self.down_until = 0.0
        self.apps: dict[str, App] = {}
        self.deployed: dict[tuple[str, str], App] = {}
        self.fns: dict[str, Fn] = {}
        self.bound: dict[bytes, str] = {}
        self.calls: dict[str, Call] = {}
        self.inputs: dict[str, Input] = {}
        self.tasks: dict[str, Task] = {}
        self.finished: collections.deque[tuple[float, Call]] = collections.deque()
        self.images: dict[str, Any] = {}
        self.mounts: dict[str, list[Any]] = {}
        self.secrets: dict[str, Secret] = {}
        self.volumes: dict[str, Volume] = {}
        self.dicts: dict[str, KeyValue] = {}
        self.queues: dict[str, KeyValue] = {}
        self.named: dict[tuple[str, str, str], str] = {}  # (id prefix, environment, name) -> id
        self.rpcs: collections.Counter[str] = collections.Counter()
        self.unimplemented: collections.Counter[str] = collections.Counter()
        self.blobs_created = 0
        self.containers_started = 0
        self.containers_forked = 0
        self.cold = False  # whether containers start cold in spite of `options.forks`
        self.faults: list[Fault] = []
        self.broken_builds: set[str] = set()  # images that install what has this text fail
        self.answered: collections.OrderedDict[tuple[str, str], Any] = collections.OrderedDict()
        self.background: set[asyncio.Task[Any]] = set()
        self.stopping = False
        for name, env in options.secrets.items():
            secret = Secret(new_id("st"), name, dict(env))
            self.secrets[secret.id] = secret
            self.named["st", "main", name] = secret.id

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in the background; `stop` cancels what is left."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self.background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            os.write(2, f"modal_local: background task failed: {error!r}\n".encode())
