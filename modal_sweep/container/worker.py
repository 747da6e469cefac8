"""What Modal runs: claims a job, starts it, watches it, saves what it wrote, returns the result.

Preemption is SIGINT. It is passed on to the job's processes, which save a checkpoint; then it is
raised again, so that Modal runs the same input in a new container. Whatever a job returns after it
was told to stop is dropped: a job that swallows the signal would look finished otherwise.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from modal_sweep.container import cloud as _cloud
from modal_sweep.container.signals import Signals, send_group
from modal_sweep.protocol import outputs, progress, result

MOUNT = Path("/mnt/hydra-sweeps")
SCRATCH = Path("/tmp/modal-launcher")
GRACE = 22.0  # Modal gives 30 s between the signal and the end
LOOK_EVERY = 0.25
STATUS_EVERY = 2.0
SAVE_EVERY = 60.0

# The process that forks jobs and our end of its socket: one per container.
zygotes: list[tuple[subprocess.Popen[bytes], socket.socket]] = []


class NewAttempt(Exception):
    """The attempt's time is up; Modal runs the job again and it continues."""


def run_job(reference: dict[str, Any], payload: bytes) -> bytes:
    """Run one job of a sweep; the envelope of its result, compressed.

    Args:
        reference: the plan's `ref` with the job's `key`.
        payload: the pickled configuration, compressed.
    """
    cloud = _cloud.Cloud(reference)
    owner = cloud.claim()
    if owner is not None:
        return result.compress({"status": "duplicate", "owner": owner})
    if reference["single_use"]:
        cloud.status(state="starting")
    folder: Path = MOUNT / reference["key"]
    if cloud.attempt > 1:
        cloud.reload()
        finished = folder / "result.bin"
        if finished.exists():  # killed between its last commit and its return
            return finished.read_bytes()
    attempt = Attempt(reference, payload, folder, cloud)
    with Signals() as signals:
        envelope = attempt.run(signals)
    return attempt.finish(envelope)


class Attempt:
    """One attempt at a job, in one container."""

    def __init__(
        self, reference: dict[str, Any], payload: bytes, folder: Path, cloud: "_cloud.Cloud"
    ) -> None:
        self.reference, self.folder, self.cloud = reference, folder, cloud
        self.output_dir = Path(reference["output_dir"])
        self.progress = self.output_dir / (reference["progress_file"] or "")
        self.tail = progress.Tail(self.progress, reference["progress_keys"])
        self.started = time.time()
        self.manifest: dict[str, Any] = outputs.read_manifest(folder / "manifest.json")
        self.scratch = SCRATCH / reference["key"]
        self.scratch.mkdir(parents=True, exist_ok=True)
        (self.scratch / "result.json").unlink(missing_ok=True)
        (self.scratch / "payload.bin").write_bytes(payload)
        (self.scratch / "common.bin").write_bytes(cloud.common())
        names = ("cwd", "common", "sha256", "versions")
        request = {name: reference[name] for name in names}
        (self.scratch / "request.json").write_text(json.dumps(request))
        self.log = self.scratch / "log.txt"
        cwd = Path(reference["cwd"])
        if cloud.attempt > 1:
            outputs.restore(folder / "outputs", self.output_dir)
            outputs.restore(folder / "cwd", cwd)
            if (folder / "log.txt").exists() and not self.log.exists():
                outputs.copy(folder / "log.txt", self.log)
        self.before = outputs.snapshot(cwd) if reference["sync_cwd"] and cwd.is_dir() else {}

    def run(self, signals: Signals) -> dict[str, Any]:
        """Start the job's process and watch it to its end.

        Raises:
            KeyboardInterrupt: preempted. InputCancellation: cancelled. NewAttempt: time is up.
        """
        if self.cloud.attempt > 1:
            self.cloud.status(state="running", started=self.started)
        control = start_zygote()
        request = {"folder": str(self.scratch), "log": str(self.log)}
        control.sendall(json.dumps(request).encode() + b"\n")
        replies = Replies(control)
        pid = replies.wait(30.0)["pid"]
        grace = min(120.0, 0.1 * self.reference["timeout"])
        up = self.started + self.reference["timeout"] - grace - GRACE / 4
        watched = time.time()
        saved = time.time()
        while (reply := replies.wait(LOOK_EVERY)) is None:
            now = time.time()
            if signals.seen or now > up:
                self.stop(pid, replies, signals)
                signals.raise_again()
                raise NewAttempt(
                    f"{self.reference['timeout']} s are over; the job continues in a new attempt"
                )
            if now - watched > STATUS_EVERY:
                watched = now
                self.report_progress()
                if self.cloud.new_checkpoint() or now - saved > SAVE_EVERY:
                    saved = now
                    self.try_to_save()
        return self.outcome(reply["exit"])

    def stop(self, pid: int, replies: "Replies", signals: Signals) -> None:
        """Tell the job to save and end, within the time that Modal gives."""
        send_group(pid, signal.SIGINT)
        if replies.wait(5.0 if signals.cancelled else GRACE) is None:
            send_group(pid, signal.SIGKILL)
            replies.wait(2.0)
        self.try_to_save()
        self.cloud.status(state="cancelled" if signals.cancelled else "preempted")

    def outcome(self, code: int) -> dict[str, Any]:
        """The job's own report, or what its exit code says."""
        path = self.scratch / "result.json"
        if path.exists():
            envelope = json.loads(path.read_text())
        else:
            said = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            message = f"the job's process {said}{hint} before it had a result"
            envelope = {"status": "failed", "error": {"type": "JobExited", "message": message}}
        if envelope["status"] == "completed" and result.is_nan(envelope["value"]):
            message = "the job returned NaN"
            envelope = {
                **envelope,
                "status": "failed",
                "error": {"type": "NotANumber", "message": message},
            }
        if envelope["status"] == "failed":
            said = self.log.read_text(errors="replace") if self.log.exists() else ""
            envelope["tail"] = said[-2000:]
        return dict(envelope)

    def report_progress(self) -> None:
        """Say that the job runs, and what its progress file says."""
        said = self.tail.look()
        shown: dict[str, Any] = {
            key: said.last[key] for key in ("step", "loss") if key in said.last
        }
        if said.reports:
            shown["reports"] = list(said.reports)
        self.cloud.status(state="running", started=self.started, **shown)

    def keep_progress(self) -> None:
        """A progress file that lies elsewhere comes along with the outputs."""
        if self.progress.is_file() and not self.progress.is_relative_to(self.output_dir):
            place = progress.place(str(self.progress), self.output_dir)
            outputs.copy(self.progress, self.output_dir / place)

    def try_to_save(self) -> None:
        """Save in the middle of a job: a Volume that refuses is the job's end only at its end."""
        try:
            self.copy_outputs()
            self.cloud.commit()
        except OSError as error:
            print(f"modal_launcher: outputs are not saved yet: {error}", file=sys.stderr)

    def copy_outputs(self) -> None:
        """Outputs, their manifest and the log to the Volume."""
        self.keep_progress()
        self.manifest = outputs.save(self.output_dir, self.folder / "outputs", self.manifest)
        if self.log.exists():
            outputs.copy(self.log, self.folder / "log.txt")
        outputs.write(self.folder, "manifest.json", [json.dumps(self.manifest).encode()])

    def finish(self, envelope: dict[str, Any]) -> bytes:
        """Save everything, then the result, commit, report; returns the result's bytes."""
        self.keep_progress()
        envelope["attempt"] = self.cloud.attempt
        envelope["seconds"] = round(time.time() - self.started, 2)
        try:
            envelope["cwd_files"] = self.save_cwd()
            # Small outputs are all in the result: it is the only file then.
            packed = result.pack_whole(envelope, self.output_dir, self.log)
            if packed is None or self.manifest:
                self.copy_outputs()
            packed = packed or result.pack(envelope, self.manifest)
            outputs.write(self.folder, "result.bin", [packed])
            self.cloud.commit()
        except OSError as error:
            lost = f"the job ended ({envelope['status']}), but its files were not saved: {error}"
            envelope["status"] = "failed"
            envelope["error"] = {"type": "NotSaved", "message": lost}
            packed = result.pack(envelope, {})
        self.cloud.over()
        return packed

    def save_cwd(self) -> dict[str, Any]:
        """With sync_cwd: the files that the job made or changed below the launch directory."""
        if not self.reference["sync_cwd"]:
            return {}
        cwd = Path(self.reference["cwd"])
        listed = {}
        for path in outputs.changed(cwd, self.before, self.output_dir):
            name = path.relative_to(cwd).as_posix()
            outputs.copy(path, self.folder / "cwd" / name)
            listed[name] = {
                "size": path.stat().st_size,
                "sha256": outputs.file_digest(self.folder / "cwd" / name),
            }
        return listed


class Replies:
    """Lines of JSON from the zygote."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.buffer = b""

    def wait(self, seconds: float) -> Any:
        """The next reply, or None when none came in time; raises RuntimeError at the end."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self.control.settimeout(left)
            try:
                data = self.control.recv(65536)
            except TimeoutError:
                return None
            if not data:
                raise RuntimeError("the process that starts jobs has ended")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)


def start_zygote() -> socket.socket:
    """Our end of the socket of the process that forks jobs, started once per container."""
    if not zygotes or zygotes[-1][0].poll() is not None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "modal_sweep.container.zygote"]
        path = os.environ.get("PYTHONPATH", "")
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            # The sources are in /root.
            env={**os.environ, "PYTHONPATH": path or "/root", "PYTHONUNBUFFERED": "1"},
        )
        theirs.close()
        zygotes.append((process, ours))
    return zygotes[-1][1]
