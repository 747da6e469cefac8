"""Starts the project's own scripts by forks of a process that has imported what they import.

A start costs a tenth of a second instead of the five that torch and transformers take. A started
script is a process like any other: its own pid, arguments, environment, folder and files, killed
and waited for as `subprocess.Popen`'s are. That a script imports what it needs is for tests that
start it cold. The forking process enters neither Hydra nor torch's threads, and ends with the
tests; what it forks does not know it.

`warm_containers` does the same for containers of the local Modal, with a process of their own.

Where a script forks its own processes from multiprocessing's fork server, that is a fork, too: a
spare child of the script, which the program asks that multiprocessing starts as Python.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import multiprocessing
import multiprocessing.process
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import warm_containers
from modal_local.orders import give, receive
from warm_programs import SPARED, STARTED, program
from warm_spares import keep_fork_servers, keep_spare

REPOSITORY = Path(__file__).resolve().parent.parent
SEVERAL = re.compile(r"(trainer\.gpus|preprocess\.processes)=[2-9]|target\.placement=ray")
"""An option of a script that starts a fork server."""
BEGAN_WITH = dict(os.environ)
RUNNING: list[subprocess.Popen[bytes]] = []
"""What this process has started, of all its tests or of a tier's."""
STAGES = "prep regen preprocess train export bench bench_sweep pretrain sft".split()


def preload(kind: str) -> None:
    """Import what the stages import, or what any Hydra app does."""
    names = ["hydra", "hydra._internal.hydra", "hydra._internal.config_loader_impl"]
    names += ["hydra_sweeps.grid.run", "hydra_sweeps.study.run", "specforge_exp.cli"]
    if kind == "apps":
        names += ["optuna.storages._rdb.storage", "sqlalchemy.dialects.sqlite"]
    if kind == "modal":
        names += ["modal", "rich.table", "modal_sweep.client.launch", "modal_sweep.client.session"]
    if kind == "stages":
        names += [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3")]
        names += ["specforge_exp.drafts.eagle3.draft", "specforge_exp.drafts.dflash.draft"]
        names += [f"specforge_exp.stages.{name}" for name in (*STAGES, "report")]
        names += ["specforge_exp.report.charts"]
    for name in names:
        importlib.import_module(name)
    # Hydra copies its store for every composition. Here as in the scripts there is one per process.
    store = sys.modules["hydra.core.config_store"].ConfigStore.instance()
    vars(store)["__deepcopy__"] = lambda memo: store
    gc.collect()
    gc.freeze()  # no fork looks through what is imported, or copies its pages by that


def execute(cwd: str, more: list[str]) -> None:
    """Do what `sys.argv` says, as Python does; `more` are the folders of PYTHONPATH."""
    if sys.argv[0] == "-c":
        code_of_it = sys.argv.pop(1)
        sys.path[:0] = ["", *more]
        exec(code_of_it, {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        _, module, *arguments = sys.argv
        sys.argv, sys.path[:0] = [module, *arguments], [cwd, *more]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        path = Path(sys.argv[0]).resolve()
        sys.path[:0] = [str(path.parent), *more]
        runpy.run_path(sys.argv[0], run_name="__main__")


def become(order: dict[str, Any], job_server: socket.socket | None = None) -> None:
    """Be the script that was ordered; never returns. What asks for a job server is the container's
    main process, the only one whose Python asks for a spare."""
    code = 1
    try:
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        more = [*filter(None, order["env"].get("PYTHONPATH", "").split(os.pathsep))]
        sys.argv = list(order["words"])
        multiprocessing.process.ORIGINAL_DIR = order["cwd"]  # type: ignore[attr-defined]
        for folder in more:  # as Python does when it starts
            if os.path.exists(f"{folder}/sitecustomize.py"):
                runpy.run_path(f"{folder}/sitecustomize.py")
        if order.get("spares") and (asked := keep_fork_servers(order["python"], order["spares"])):
            become(asked)
        if job_server:
            if asked := keep_spare(job_server):
                become(asked)
            sys.executable = order["python"]
        execute(order["cwd"], more)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:  # as Python ends then
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)


def forked(connection: socket.socket, python: str, contained: bool) -> tuple[int, bool]:
    """Fork for an order; the child's pid, 0 without one, and whether it ends with who ordered."""
    order, files = receive(connection)
    if contained and order and not warm_containers.alike(order["env"]):
        connection.sendall(b"0\n")
        order = {}
    pid = os.fork() if order else 0
    if order and not pid:
        signal.set_wakeup_fd(-1)
        if order["session"]:
            os.setsid()
        connection.sendall(b"%d\n" % os.getpid())
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, 1024)
        job_server = warm_containers.contain(order) if contained else None
        become({"python": python, **order}, job_server)
    for file in files:
        os.close(file)
    return pid, "bound" in order


def tell_of_ends(children: dict[int, socket.socket], bound: Container[int]) -> None:
    """Say its status to everyone whose process has ended; nothing of a bound one lives on."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            break
        if pid in bound:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        with children.pop(pid) as connection, suppress(BrokenPipeError):
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def serve(kind: str, path: str) -> None:
    """Fork for every order on the socket until the tests' end of standard input closes."""
    contained = kind in warm_containers.KINDS
    if not contained:
        preload(kind)
    names = '["\\0" + name for name in os.environ.get("WARM_SPARES", "").split()]'
    begins = "from multiprocessing.forkserver "
    python = program(f"{path}.python", SPARED, begins=begins, addresses=names)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    if contained:  # tests may have no such container
        if 0 in select.select([0, listener], [], [])[0]:
            os._exit(0)
        warm_containers.preload(kind)
    wake, waker = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: dict[int, socket.socket] = {}
    bound: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([0, listener, wake, *bound.values()], [], [])
        if 0 in ready:  # it never holds anything but its end
            os._exit(0)
        if wake in ready:
            os.read(wake, 4096)
            tell_of_ends(children, bound)
        for pid in [pid for pid, connection in bound.items() if connection in ready]:
            for kill in (os.kill, os.killpg):  # who ordered it is gone; or it has ended itself
                with suppress(ProcessLookupError):
                    if pid in children:
                        kill(pid, signal.SIGKILL)
        bound = {pid: each for pid, each in bound.items() if each not in ready and pid in children}
        if listener in ready:
            connection, _ = listener.accept()
            pid, ends = forked(connection, python, contained)
            if pid:
                children[pid] = connection
                bound |= {pid: connection} if ends else {}


@cache
def python(*scripts: str, kind: str = "stages") -> str:
    """The path of a program that is Python, but for scripts of these names (modules behind -m, or
    -c), which it starts as forks: for shells, and for commands that others start."""
    folder = Path(server(kind)).with_name("-".join(["python", kind, *scripts]))
    folder.mkdir(exist_ok=True)
    return program(f"{folder}/python", STARTED, scripts=scripts, server=server(kind))


@cache
def server(kind: str) -> str:
    """The socket of a forking process: the tier's, for all its workers, or this process's own. It
    ends with whichever it is."""
    folder = os.environ.get("WARM_FOLDER")  # of tests/tiers.py, which holds `alive` open
    path = f"{folder or tempfile.mkdtemp(prefix='warm-')}/{kind}"
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            process = forking(kind, path, f"{folder}/alive" if folder else None)
            Path(f"{path}.pid").write_text(str(process.pid))
            RUNNING.append(process)
            if not folder:
                atexit.register(process.communicate)  # closes its standard input, and waits for it
    return path


def forking(kind: str, path: str, alive: str | None) -> subprocess.Popen[bytes]:
    """Start a forking process and wait until it listens at `path`. It ends with its standard input,
    which is a pipe, or what `alive` names."""
    environment = {**BEGAN_WITH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if kind in warm_containers.KINDS:
        environment = warm_containers.ENVIRONMENT
    given = os.open(alive, os.O_RDONLY) if alive else subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, __file__, kind, path], stdin=given, cwd=REPOSITORY, env=environment
    )
    if alive:
        os.close(given)
    while not os.path.exists(path):
        assert process.poll() is None, "what the scripts import cannot be imported"
        time.sleep(0.02)
    return process


class Started:
    """A script that was started; what tests use of `subprocess.Popen`."""

    def __init__(
        self, kind: str, order: dict[str, Any], given: IO[str], output: list[IO[str]]
    ) -> None:
        self.args, self.output, self.received = order["words"], output, b""
        self.returncode: int | None = None
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(server(kind))
        give(self.connection, order, [file.fileno() for file in (given, output[0], output[-1])])
        while b"\n" not in self.received:
            piece = self.connection.recv(64)
            assert piece, "the forking process is gone"
            self.received += piece
        pid, self.received = self.received.split(b"\n", 1)
        self.pid = int(pid)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal; TimeoutExpired when it takes longer."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            if b"\n" in self.received:
                self.returncode = int(self.received)
                self.connection.close()
                break
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.connection], [], [], left)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            piece = self.connection.recv(64)
            assert piece, "the forking process is gone"
            self.received += piece
        return self.returncode

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed to its end, and its errors; those are "" where both are one."""
        self.wait(timeout)
        return self.printed(), self.printed(-1) if len(self.output) > 1 else ""

    def printed(self, stream: int = 0) -> str:
        """What it has printed so far; -1: its errors."""
        number = self.output[stream].fileno()
        return os.pread(number, os.fstat(number).st_size, 0).decode(errors="replace")

    def send_signal(self, number: int) -> None:
        """Only while it runs: a pid may be another's afterwards."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(
    words: Sequence[str], cwd: Path | str = REPOSITORY, env: Mapping[str, str] | None = None,
    *, together: bool = False, session: bool = False, kind: str | None = None,
    log: Path | None = None, typed: str = "", spares: int = 1,
) -> Started:  # fmt: skip
    """Start a script.

    Args:
        words: it and its arguments, or -m and a module; `sys.executable` may stand before them.
        together: its errors are in what it prints.
        session: it has a session of its own, to be killed with all that it starts.
        kind: of what is imported already; None: what the script's name says.
        log: a file for all that it prints.
        typed: what it reads from its standard input, to the end.
        spares: fork servers that it may start, if an option asks for several processes.
    """
    words = [word for at, word in enumerate(words) if at or word != sys.executable]
    env = dict(os.environ if env is None else env)
    order = {"words": words, "cwd": str(cwd), "env": env, "session": session}
    several = sys.platform == "linux" and any(SEVERAL.match(word) for word in words)
    order["spares"] = spares if several else 0
    if kind is None:
        kind = "stages" if Path(words[0]).stem in STAGES else "apps"
    if log:
        output = [log.open("w+")]
    else:
        output = [tempfile.TemporaryFile("w+") for _ in range(1 if together else 2)]  # noqa: SIM115
    with tempfile.TemporaryFile("w+") as given:
        given.write(typed)
        given.seek(0)
        return Started(kind, order, given, output)


def run(
    words: Sequence[str], cwd: Path | str = REPOSITORY, env: Mapping[str, str] | None = None,
    together: bool = False, timeout: float = 300, *, kind: str | None = None, typed: str = "",
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a script to its end, whose exit status is the caller's to judge; as `start`."""
    started = start(words, cwd, env, together=together, kind=kind, typed=typed)
    try:
        output, errors = started.communicate(timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        raise
    return subprocess.CompletedProcess(words, started.returncode or 0, output, errors)


if __name__ == "__main__":
    serve(*sys.argv[1:])
