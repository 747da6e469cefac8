"""Jobs as processes of this machine: what hydra/launcher=basic becomes with several in flight."""

import fcntl
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from omegaconf import DictConfig, OmegaConf

from hydra_sweeps.errors import JobFailed
from hydra_sweeps.jobs import SIGNALS, Ends, Job, Reports, Source, compose, failure, show_failure
from hydra_sweeps.records import Tail

log = logging.getLogger(__name__)

GRACE = 60.0
"""Seconds that a job gets to save after SIGTERM when all have to end."""
LOCK = ".job.lock"


@dataclass
class JobProcess:
    """A job that runs."""

    overrides: Sequence[str]
    process: BaseProcess
    result: Connection
    output: Path | None
    """Where it prints; None: where this process does."""
    progress: Tail


@dataclass
class Processes:
    """A runner that forks a process for each job.

    A job ends with its controller: it gets SIGTERM when that is gone. It holds a lock in its output
    directory, so a job that is started again waits until its predecessor has saved.
    """

    launcher: Any
    """Hydra's BasicLauncher, after its `setup`."""
    redirect: bool
    """Print to <output_dir>/<job name>.out."""
    jobs: dict[int, JobProcess] = field(default_factory=dict)
    unmade: Ends = field(default_factory=list)
    """Ends of jobs that could not be composed."""
    last: Reports = field(default_factory=dict)
    """Progress of jobs whose end was given."""

    def __post_init__(self) -> None:
        setup_globals()
        master = self.launcher.config
        configure_log(master.hydra.hydra_logging, master.hydra.verbose)
        Path(str(master.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)

    def start(self, number: int, overrides: Sequence[str], job: Job | None = None) -> None:
        """Fork a job; compose it where the caller has not."""
        log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
        source = Source(self.launcher.config, self.launcher.hydra_context)
        try:
            job = job or compose(source, overrides, number)
            folder = Path(str(job.value("hydra.sweep.dir")), job.subdir)
            progress = job.value("hydra.sweeper.progress_file")
            folder.mkdir(parents=True, exist_ok=True)
        except Exception as error:
            self.unmade.append((number, failure(overrides, error)))
            return
        config = job.config
        tail = Tail(Path(str(progress)) if progress else None, not began(config, folder))
        output = folder / f"{config.hydra.job.name}.out" if self.redirect else None
        sys.stdout.flush()
        sys.stderr.flush()
        forks = get_context("fork")
        with blocked_signals():  # a process that is forked also stands in the list
            result, send = forks.Pipe(duplex=False)
            process = forks.Process(
                target=self.child, args=(config, folder, output, send, os.getpid())
            )
            process.start()
            send.close()  # so that the pipe ends with the job
            self.jobs[number] = JobProcess(overrides, process, result, output, tail)

    def child(
        self, config: DictConfig, folder: Path, output: Path | None, send: Connection, parent: int
    ) -> None:
        """What the forked process does."""
        os.setsid()  # Ctrl-C reaches the controller alone, which then decides
        default_signals()
        if output is not None:
            redirect(output)
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
        with (folder / LOCK).open("w") as lock:
            lock_or_wait(lock.fileno(), folder)
            returned = run_job(
                hydra_context=self.launcher.hydra_context,
                task_function=self.launcher.task_function,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            show_failure(returned)
            send.send_bytes(packed(returned))
        send.close()

    def ended(self, seconds: float) -> Ends:
        """Wait for the first end."""
        done, self.unmade = self.unmade, []
        if not self.jobs:
            return done
        ends: dict[Any, int] = {}
        for number, job in self.jobs.items():
            ends |= {job.result: number, job.process.sentinel: number}
        ready = {ends[end] for end in wait(list(ends), 0 if done else seconds)}
        for number in sorted(ready):
            done.append((number, result_of(self.jobs[number])))
            self.last[number] = self.jobs.pop(number).progress.whole_lines()
        return done

    def reports(self) -> Reports:
        """New lines of the files that hydra.sweeper.progress_file names."""
        lines = self.last | {n: job.progress.whole_lines() for n, job in self.jobs.items()}
        self.last = {}
        return {number: new for number, new in lines.items() if new}

    def stop(self, number: int) -> None:
        """SIGTERM."""
        if job := self.jobs.get(number):
            job.process.terminate()

    def close(self) -> None:
        """SIGTERM to all, and SIGKILL to those that take more than `GRACE` seconds to save."""
        for number in self.jobs:
            self.stop(number)
        deadline = time.monotonic() + GRACE
        try:
            for job in self.jobs.values():
                job.process.join(max(0.0, deadline - time.monotonic()))
        finally:  # after another Ctrl-C: at once
            for job in self.jobs.values():
                kill(job.process)
                job.result.close()
            self.jobs.clear()


def began(config: DictConfig, folder: Path) -> bool:
    """Whether a process before this one began the same job in its folder, by Hydra's record."""
    try:
        kept = OmegaConf.load(folder / str(config.hydra.output_subdir) / "overrides.yaml")
    except (OSError, ValueError):
        return False
    return bool(kept == config.hydra.overrides.task)


def result_of(job: JobProcess) -> JobReturn:
    """What a job sent, or how it ended without sending anything."""
    returned: JobReturn | None = None
    try:
        if job.result.poll():
            returned = pickle.loads(job.result.recv_bytes())
    except (EOFError, OSError):  # it ended while it was sending
        pass
    job.process.join(5)  # what it left running has no say
    kill(job.process)
    job.result.close()
    if returned is not None:
        return returned
    output = f"; its output: {job.output}" if job.output else ""
    return failure(job.overrides, JobFailed(f"{how_it_ended(job.process.exitcode)}{output}"))


def how_it_ended(code: int | None) -> str:
    """A process's end in words."""
    if code is None or code >= 0:
        return f"the job's process ended with exit code {code} and no result"
    name = signal.Signals(-code).name
    guess = " (out of memory?)" if name == "SIGKILL" else ""
    return f"the job's process was ended by {name}{guess}"


def kill(process: BaseProcess) -> None:
    """End a process, and those that it started, if it is still there."""
    if process.is_alive() and process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has no session of its own yet
            process.kill()
        process.join()


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Signals of this thread wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def default_signals() -> None:
    """The controller's handlers are not the job's."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def redirect(path: Path) -> None:
    """Print to the end of a file from here on."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    opened = partial(open, mode="w", buffering=1, errors="backslashreplace", closefd=False)
    sys.stdout, sys.stderr = opened(1), opened(2)


def end_with(parent: int) -> None:
    """SIGTERM to this process when its parent is gone: nobody else would end it."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


def lock_or_wait(lock: int, folder: Path) -> None:
    """Lock a job's folder; the job of a controller that was killed may be saving there."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: waiting until an earlier process of this job has ended", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: as if there were none
        pass


def packed(returned: JobReturn) -> bytes:
    """A job's record for the pipe; what pickle cannot take becomes a failure that says so."""
    check_value(returned)
    try:
        raw = pickled(returned)
        pickle.loads(raw)  # exceptions with arguments of their own fail only here
        return raw
    except Exception:
        value = returned._return_value
        text = f"{type(value).__name__}: {value}"
        returned.status, returned.return_value = JobStatus.FAILED, JobFailed(text)
        return pickle.dumps(returned)


def check_value(returned: JobReturn) -> None:
    """A value that could not be sent is a failure also where nothing is sent."""
    if returned.status == JobStatus.COMPLETED:
        value = returned._return_value
        try:
            pickled(value)
        except Exception as error:
            text = f"the return value, a {type(value).__name__}, cannot be sent: {error}"
            returned.status, returned.return_value = JobStatus.FAILED, JobFailed(text)


def pickled(value: Any) -> bytes:
    """As pickle takes it, else as cloudpickle does, which calls on Modal use too."""
    try:
        return pickle.dumps(value)
    except Exception:
        if find_spec("cloudpickle") is None:
            raise
        import cloudpickle

        return bytes(cloudpickle.dumps(value))
