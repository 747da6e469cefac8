"""The Ray that workers live in: started for one training and ended with it, or joined.

A cluster that is started here holds nothing but workers, listens on loopback only, and lets nobody
in without a secret that is made for it and handed on in the environment alone. Its processes are
this one's children and end with it, however it ends.
"""

import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from specforge_exp.artifacts import model_digest
from specforge_exp.config import Config
from specforge_exp.config.machine import command
from specforge_exp.errors import InputError, first_line
from specforge_exp.inference import FLEET
from specforge_exp.inference.holder import hold
from specforge_exp.inference.split import Split, check_shared_memory, joins
from specforge_exp.inference.store import check_mooncake, silent
from specforge_exp.inference.worker import TargetWorker
from specforge_exp.interrupt import ended_cleanly
from specforge_exp.provenance import maker

log = logging.getLogger(__name__)

FENCED = "SPECFORGE_EXP_RAY_FENCED"
"""Environment variable: Ray has been told to stay on this machine, which it reads when imported."""
CLUSTERS = Path(f"/tmp/sf-ray-{os.getuid()}")
"""Where a user's clusters have their folders; short, for it begins the names of sockets."""
LEFTOVERS = Path(__file__).with_name("leftovers.py")
STARTS = 5
"""Attempts: a node must be up within 30 s, which a busy machine does not always reach."""
REPEATS = 3
"""Times that Ray repeats a call whose worker died."""
RESUME = "run the same command to continue"


@dataclass(frozen=True)
class Fleet:
    """Workers, and where a trainer finds them."""

    address: str
    namespace: str
    workers: int
    ahead: int
    """Bytes that one trainer may have asked for and not used yet."""
    node: dict[str, int]
    """Processes of a cluster that was started here, by name: without them there is none."""
    store: str = ""
    """What holds states: the address of Mooncake's master; "": Ray."""

    def check(self) -> None:
        """Refuse to wait for a cluster that has ended.

        Raises:
            InputError: a process of it is gone.
        """
        for name, pid in self.node.items():
            if not running(pid):
                raise InputError(f"{name} (process {pid}) has ended; {RESUME}")


@dataclass(frozen=True)
class Cluster:
    """What a fleet lives in."""

    fleet: Fleet
    watcher: subprocess.Popen[bytes] | None
    """Ends what is left of a cluster that was started here; see `leftovers`."""
    folder: Path | None = None
    """That of a cluster that was started here."""


def running(pid: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def fleet_of(cfg: Config, split: Split) -> Iterator[Fleet]:
    """Workers with the target loaded, for the trainers that this process starts.

    Raises:
        InputError: Ray is missing or does not start, or a worker cannot load the target.
    """
    ray, cluster, ended = import_ray(), None, Event()
    if split.segment:
        check_mooncake()
    with ended_cleanly():
        try:
            began = time.monotonic()
            cluster = start_or_join(ray, split)
            address, held = hold(cluster.folder, split.segment, ended)
            fleet = replace(cluster.fleet, store=address, node=cluster.fleet.node | held)
            there = time.monotonic()
            log.info(
                "train: %s Ray at %s; %d workers load %s", "started" if fleet.node else "joined",
                fleet.address, split.workers, cfg.model.name,
            )  # fmt: skip
            workers = make_workers(ray, cfg, split, fleet.store)  # they live as long as this name
            trials = begin(ray, workers, fleet)
            if others := {trial["host"] for trial in trials if trial["maker"] != maker(cfg)}:
                raise InputError(
                    f"workers on {', '.join(sorted(others))} run other code or packages than this "
                    "training: bring all machines to the same, then ray stop and ray start there; "
                    f"{RESUME}"
                )
            log.info(
                "train: workers are ready: Ray took %.1f s, loading %.1f s",
                there - began, time.monotonic() - there,
            )  # fmt: skip
            if cfg.target.engine != "transformers":
                log.info(
                    "train: %s's states differ from transformers' by %.2g %% of their size",
                    cfg.target.engine, 100 * max(trial["apart"] for trial in trials),
                )  # fmt: skip
            speeds = [trial["tokens_per_s"] for trial in trials]
            for line in split.lines(sum(speeds) / len(speeds)):
                log.info("train: %s", line)
            os.environ[FLEET] = json.dumps(asdict(fleet))
            try:
                yield fleet
            except InputError:
                fleet.check()  # Ray ends a process without a word when its node has ended
                raise
        finally:
            os.environ.pop(FLEET, None)
            ended.set()
            ray.shutdown()
            if cluster and cluster.watcher:
                end_leftovers(cluster.watcher)


def start_or_join(ray: Any, split: Split) -> Cluster:
    """A cluster with nobody in it yet."""
    namespace = f"specforge-{secrets.token_hex(8)}"
    if joins():
        address = connect(ray, os.environ["RAY_ADDRESS"], namespace)
        return Cluster(Fleet(address, namespace, split.workers, split.ahead, {}), None)
    check_shared_memory(split)
    return start(ray, split, namespace)


def start(ray: Any, split: Split, namespace: str) -> Cluster:
    """A cluster of this machine with the workers' GPUs in it."""
    own_folder()
    forget_dead()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if split.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(split.gpus)
    try:
        for attempt in range(1, STARTS + 1):
            folder = Path(tempfile.mkdtemp(dir=CLUSTERS))
            lock(folder)
            watcher = watch(folder)
            try:
                address = init(
                    ray, "local", namespace, num_cpus=split.workers, num_gpus=len(split.gpus),
                    include_dashboard=False, object_store_memory=split.store,
                    _temp_dir=str(folder),
                    _system_config={"automatic_object_spilling_enabled": False},
                )  # fmt: skip
                break
            except Exception as error:  # Ray raises many kinds, also plain ones
                ray.shutdown()
                end_leftovers(watcher)
                if attempt == STARTS:
                    raise InputError(f"Ray does not start: {first_line(error)}") from None
                log.warning("train: Ray did not start (%s); again", first_line(error)[:200])
    finally:
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        elif split.gpus:
            del os.environ["CUDA_VISIBLE_DEVICES"]
    processes = ray._private.worker._global_node.all_processes
    names = {"raylet": "Ray's raylet", "gcs_server": "Ray's server"}
    node = {name: processes[key][0].process.pid for key, name in names.items()}
    return Cluster(Fleet(address, namespace, split.workers, split.ahead, node), watcher, folder)


def watch(folder: Path) -> subprocess.Popen[bytes]:
    """A process that ends what is left of a cluster as soon as this one wants it or has ended."""
    command = [sys.executable, "-I", "-S", str(LEFTOVERS), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def end_leftovers(watcher: subprocess.Popen[bytes]) -> None:
    """End what a cluster, or one that did not come up, has left, and remove its folder."""
    assert watcher.stdin is not None
    watcher.stdin.close()
    if watcher.wait():
        log.warning("train: something of Ray's cluster is left in %s", CLUSTERS)


def own_folder() -> None:
    """Make `CLUSTERS`, which nobody else may look into: Ray gives its own folders to everybody.

    Raises:
        InputError: it is somebody else's, or open to others.
    """
    CLUSTERS.mkdir(mode=0o700, exist_ok=True)
    status = CLUSTERS.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not CLUSTERS.is_dir():
        raise InputError(f"{CLUSTERS} is not a folder of this user's alone; remove it")


def connect(ray: Any, address: str, namespace: str) -> str:
    """Join a cluster; returns its address.

    Raises:
        InputError: nothing answers there.
    """
    try:
        return init(ray, address, namespace)
    except Exception as error:
        raise InputError(f"no Ray answers at {address}: {first_line(error)}; {RESUME}") from None


def init(ray: Any, address: str, namespace: str, **options: Any) -> str:
    """`ray.init` without its output and its handler of SIGTERM, which would hide the training's;
    returns the cluster's address."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with silent():
            info = ray.init(
                address, namespace=namespace, log_to_driver=False, logging_level="CRITICAL",
                **options,
            )  # fmt: skip
        return str(info.address_info["gcs_address"])
    finally:
        signal.signal(signal.SIGTERM, handler)


def make_workers(ray: Any, cfg: Config, split: Split, store: str) -> list[Any]:
    """Workers that load nothing yet.

    Raises:
        InputError: a joined cluster has fewer places.
    """
    there, folder = ray.cluster_resources(), ray._private.worker._global_node.get_session_dir_path()
    on_gpu = bool(split.gpus) or (joins() and cfg.device != "cpu" and "GPU" in there)
    kind = "GPU" if on_gpu else "CPU"
    each = cfg.target.tp_size if on_gpu else 1
    if there.get(kind, 0) < each * split.workers:
        raise InputError(
            f"target.workers={split.workers} with target.tp_size={each}, but Ray has "
            f"{there.get(kind, 0):g} {kind}s; ray start --num-{kind.lower()}s=... on more machines"
        )
    actor = ray.remote(
        max_restarts=-1, max_task_retries=REPEATS, num_gpus=each * on_gpu, num_cpus=int(not on_gpu),
        scheduling_strategy="SPREAD",
    )(TargetWorker)  # fmt: skip
    digest = model_digest(cfg.model.path)
    return [
        actor.options(name=f"worker-{number}").remote(cfg, split.threads, folder, store, digest)
        for number in range(split.workers)
    ]


def begin(ray: Any, workers: list[Any], fleet: Fleet) -> list[dict[str, Any]]:
    """Wait until each has loaded the target; what each says of its trial.

    Raises:
        InputError: one refuses the target or dies of it, or the cluster has ended.
    """
    waiting, trials = [worker.begin.remote() for worker in workers], []
    with tqdm(total=len(workers), desc="workers", unit="target", disable=None) as bar:
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=1)
            fleet.check()
            for answer in ready:
                trials.append(answer_of(ray, answer))
                bar.update()
    return trials


def answer_of(ray: Any, answer: Any) -> Any:
    """A worker's answer; InputError for what it refuses, or when it died."""
    try:
        return ray.get(answer)
    except ray.exceptions.RayError as error:
        raise refusal(error, "a worker could not load the target") from None


def refusal(error: Any, what: str) -> InputError:
    """What a worker refused; else that `what` happened and how Ray says why."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, InputError):
        return InputError(str(cause))
    return InputError(f"{what}: {reason(error)}; {RESUME}")


def reason(error: Any) -> str:
    """Why a call failed, in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {first_line(cause)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def given() -> Fleet:
    """What the process that started this one wants it to join.

    Raises:
        InputError: nothing, since it is a run alone.
    """
    if FLEET not in os.environ:
        raise InputError(
            "target.share=sweep is for the runs of a grid that go on at the same time on this "
            "machine (-m, hydra.sweeper.n_jobs=4); a run alone: "
            f"{command('train', 'target.share=none', away=False)}"
        )
    return Fleet(**json.loads(os.environ[FLEET]))


def join_fleet(fleet: Fleet) -> tuple[Any, list[Any]]:
    """Become one of those that ask a fleet: Ray, and its workers."""
    ray = import_ray()
    fleet.check()
    if not ray.is_initialized():
        connect(ray, fleet.address, fleet.namespace)
    names = [f"worker-{number}" for number in range(fleet.workers)]
    return ray, [ray.get_actor(name, fleet.namespace) for name in names]


def import_ray() -> Any:
    """Ray, told to stay on this machine unless it is one of several.

    Raises:
        InputError: it is not installed.
    """
    if "ray" in sys.modules and FENCED not in os.environ and not joins():
        raise InputError("Ray was imported before target.placement=ray could keep it on loopback")
    if not joins():
        os.environ[FENCED] = "1"
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # its switch for loopback only
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # it reads this once
    os.environ.setdefault("RAY_worker_niceness", "0")  # it starts workers at 15
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it writes between our lines
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray._private.worker as internals
    except ImportError:
        raise InputError(
            "target.placement=ray needs Ray: pip install 'specforge-exp[ray]' (in a checkout: "
            "pip install -e '.[ray]')"
        ) from None
    # Prints pages of a dead node's log; what a user needs to know is said in one line.
    vars(internals)["listen_error_messages"] = lambda *_: None
    return ray


def lock(folder: Path) -> None:
    """Hold a cluster's folder as long as this process lives."""
    fcntl.flock(os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600), fcntl.LOCK_EX)


def forget_dead() -> None:
    """Remove the folders of clusters whose process was killed."""
    for folder in CLUSTERS.iterdir():
        try:
            file = os.open(folder / "lock", os.O_RDWR)
        except OSError:  # somebody else's
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # alive
            pass
        finally:
            os.close(file)
