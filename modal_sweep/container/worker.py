"""What Modal runs: claims a job, starts it, watches it, saves what it wrote, returns the result.

Preemption is SIGINT. It is passed on to the job's processes, which save a checkpoint; then it is
raised again, so that Modal runs the same input in a new container. Whatever a job returns after it
was told to stop is dropped: a job that swallows the signal would look finished otherwise.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from modal.exception import InputCancellation

from modal_sweep.container import zygote
from modal_sweep.container.cloud import Cloud, common_part
from modal_sweep.container.request import Request
from modal_sweep.protocol import outputs, progress, result
from modal_sweep.protocol.names import MOUNT
from modal_sweep.protocol.outage import away
from modal_sweep.protocol.records import write_whole

SCRATCH = Path("/tmp/modal-launcher")
GRACE = 22.0  # Modal gives 30 s between the signal and the end
LOOK_EVERY = 0.25
STATUS_EVERY = 2.0
SAVE_EVERY = 60.0


class NewAttempt(Exception):
    """The attempt's time is up; Modal runs the job again and it continues."""


def run_job(reference: dict[str, Any], payload: bytes) -> bytes:
    """Run one job of a sweep; the envelope of its result, compressed.

    Args:
        reference: the plan's `ref` with the job's `key`.
        payload: the pickled configuration, compressed.
    """
    cloud = Cloud(reference)
    owner = cloud.claim()
    if owner is not None:
        return result.compress({"status": "duplicate", "owner": owner})
    if reference["single_use"]:
        cloud.status(state="starting")
    folder = Path(MOUNT, reference["key"])
    if cloud.attempt > 1:
        cloud.reload()
        finished = folder / "result.bin"
        if finished.exists():  # killed between its last commit and its return
            return finished.read_bytes()
    try:
        attempt = Attempt(reference, payload, folder, cloud)
        with noted_signals() as seen:
            envelope = attempt.run(seen)
        return attempt.finish(envelope)
    except OSError as error:
        if away(error):
            raise
        # A name that is too long, no right, no space: another attempt is paid for in vain.
        return result.compress(result.failed(type(error).__name__, str(error)))


@contextlib.contextmanager
def noted_signals() -> Iterator[set[int]]:
    """The numbers of SIGINT (preemption) and SIGUSR1 (cancellation) as they come, instead of what
    Modal raises for them. Outside the main thread nothing comes."""
    seen: set[int] = set()
    earlier: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for stop in (signal.SIGINT, signal.SIGUSR1):
            earlier[stop] = signal.signal(stop, lambda number, frame: seen.add(number))
    try:
        yield seen
    finally:
        for stop, handler in earlier.items():
            signal.signal(stop, handler)


def send_group(pid: int, number: int) -> None:
    """Signal a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def checked(content: bytes, sha256: str) -> bytes:
    """Bytes whose hash came with the call; raises ValueError when they are others."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("this is not what the launcher sent")
    return content


class Attempt:
    """One attempt at a job, in one container."""

    def __init__(
        self, reference: dict[str, Any], payload: bytes, folder: Path, cloud: Cloud
    ) -> None:
        self.reference, self.folder, self.cloud = reference, folder, cloud
        self.output_dir = Path(reference["output_dir"])
        self.progress = self.output_dir / (reference["progress_file"] or "")
        self.tail = progress.Tail(
            self.progress, reference["progress_keys"], strange=cloud.attempt == 1
        )
        self.started = time.time()
        saved = folder / "manifest.json"
        self.manifest: dict[str, Any] = json.loads(saved.read_text()) if saved.exists() else {}
        scratch = SCRATCH / reference["key"]
        scratch.mkdir(parents=True, exist_ok=True)
        self.log, self.result = scratch / "log.txt", scratch / "result.json"
        self.result.unlink(missing_ok=True)
        self.request = Request(
            reference,
            checked(common_part(reference["common"]), reference["common"]),
            checked(payload, reference["sha256"]),
            self.log,
            self.result,
        )
        cwd = Path(reference["cwd"])
        self.before = outputs.snapshot(cwd) if reference["sync_cwd"] and cwd.is_dir() else {}
        if cloud.attempt > 1:
            outputs.restore(folder / "outputs", self.output_dir)
            outputs.restore(folder / "cwd", cwd)
            if (folder / "log.txt").exists() and not self.log.exists():
                outputs.copy(folder / "log.txt", self.log)

    def run(self, seen: set[int]) -> dict[str, Any]:
        """Start the job's process and watch it to its end, or until a signal is seen.

        Raises:
            KeyboardInterrupt: preempted. InputCancellation: cancelled. NewAttempt: time is up.
        """
        if self.cloud.attempt > 1:
            self.cloud.status(state="running", started=self.started)
        control = zygote.start()
        control.send(self.request)
        pid = zygote.answer(control)
        grace = min(120.0, 0.1 * self.reference["timeout"])
        up = self.started + self.reference["timeout"] - grace - GRACE / 4
        watched = saved = time.time()
        while not control.poll(LOOK_EVERY):
            now = time.time()
            if seen or now > up:
                self.stop(pid, control, signal.SIGUSR1 in seen)
                if signal.SIGINT in seen:
                    raise KeyboardInterrupt
                if seen:
                    raise InputCancellation("Input was cancelled by user")
                raise NewAttempt(
                    f"{self.reference['timeout']} s are over; the job continues in a new attempt"
                )
            if now - watched > STATUS_EVERY:
                watched = now
                self.report_progress()
                if self.cloud.new_checkpoint() or now - saved > SAVE_EVERY:
                    saved = now
                    self.try_to_save()
        return self.outcome(zygote.answer(control))

    def stop(self, pid: int, control: Connection, cancelled: bool) -> None:
        """Tell the job to save and end, within the time that Modal gives."""
        send_group(pid, signal.SIGINT)
        if not control.poll(5.0 if cancelled else GRACE):
            send_group(pid, signal.SIGKILL)
        if control.poll(2.0):
            zygote.answer(control)
        self.try_to_save()
        self.cloud.status(state="cancelled" if cancelled else "preempted")

    def outcome(self, code: int) -> dict[str, Any]:
        """The job's own report, or what its exit code says."""
        if self.result.exists():
            envelope = json.loads(self.result.read_text())
        else:
            ended = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            message = f"the job's process {ended}{hint} before it had a result"
            envelope = result.failed("JobExited", message)
        if envelope["status"] == "completed" and result.is_nan(envelope["value"]):
            envelope |= result.failed("NotANumber", "the job returned NaN")
        if envelope["status"] == "failed":
            text = self.log.read_text(errors="replace") if self.log.exists() else ""
            envelope["tail"] = text[-2000:]
        return dict(envelope)

    def report_progress(self) -> None:
        """Say that the job runs, and what its progress file says."""
        tail = self.tail.look()
        state: dict[str, Any] = {k: tail.last[k] for k in ("step", "loss") if k in tail.last}
        if tail.reports:
            state["reports"] = list(tail.reports)
        self.cloud.status(state="running", started=self.started, **state)

    def keep_files(self, completed: bool = False) -> None:
        """A progress file, and `outputs`, that lie elsewhere come along with the outputs; not those
        of an earlier run, which a job that does not complete may have left alone."""
        if self.tail.is_strange and not completed:
            return
        for path in (self.progress, *map(Path, self.reference["outputs"])):
            if path.is_file() and not path.is_relative_to(self.output_dir):
                place = progress.place(str(path), self.output_dir)
                outputs.copy(path, self.output_dir / place)

    def try_to_save(self) -> None:
        """Save in the middle of a job: a Volume that refuses is the job's end only at its end."""
        try:
            self.copy_outputs()
            self.cloud.commit()
        except OSError as error:
            print(f"modal_launcher: outputs are not saved yet: {error}", file=sys.stderr)

    def copy_outputs(self) -> None:
        """Outputs, their manifest and the log to the Volume."""
        self.keep_files()
        self.manifest = outputs.save(self.output_dir, self.folder / "outputs", self.manifest)
        if self.log.exists():
            outputs.copy(self.log, self.folder / "log.txt")
        write_whole(self.folder / "manifest.json", [json.dumps(self.manifest).encode()])

    def finish(self, envelope: dict[str, Any]) -> bytes:
        """Save everything, then the result, commit, report; returns the result's bytes."""
        self.keep_files(envelope["status"] == "completed")
        envelope["attempt"] = self.cloud.attempt
        envelope["seconds"] = round(time.time() - self.started, 2)
        try:
            envelope["cwd_files"] = self.save_cwd()
            # Small outputs are all in the result: it is the only file then.
            packed = result.pack_whole(envelope, self.output_dir, self.log)
            if packed is None or self.manifest:
                self.copy_outputs()
            packed = packed or result.pack(envelope, self.manifest)
            write_whole(self.folder / "result.bin", [packed])
            self.cloud.commit()
        except OSError as error:
            lost = f"the job ended ({envelope['status']}), but its files were not saved: {error}"
            envelope |= result.failed("NotSaved", lost)
            packed = result.pack(envelope, {})
        self.cloud.over()
        return packed

    def save_cwd(self) -> dict[str, Any]:
        """With sync_cwd: the files that the job made or changed below the launch directory."""
        if not self.reference["sync_cwd"]:
            return {}
        cwd, saved = Path(self.reference["cwd"]), self.folder / "cwd"
        files = outputs.save(cwd, saved, self.before, self.output_dir)
        return result.listed({n: entry for n, entry in files.items() if "sha256" in entry})
