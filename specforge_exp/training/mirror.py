"""Copies a run's metrics.jsonl to W&B or trackio, in a process of its own.

A tracker that fails, hangs or is killed then costs the training nothing. tracking.py starts it and
writes one line of JSON; it ends when its standard input does, which is also when the training is
killed. It imports nothing of the package.

What a tracker has already is not sent again, what it lacks is: the lines are counted by step in
tracker.json, or by W&B's server.
"""

import contextlib
import fcntl
import io
import json
import os
import secrets
import select
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

POLL_SECONDS = 1.0

Place = tuple[int, int]
"""Where a line stands: its step, and 1 for evaluations, which follow the step's own line."""


@dataclass
class TrackerRun:
    """A run of a tracker."""

    log: Callable[..., None]
    """Takes the metrics and their `step`."""
    finish: Callable[[int], None]
    """Takes the exit code of the training."""
    record: dict[str, Any]
    """Its id and, where there are some, url and the command that uploads it."""
    after: Place
    """It has all lines up to this one."""


class LenientFile(io.FileIO):
    """A file whose reader may be gone: a tracker's message must not end its work."""

    def write(self, data: Any) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def main() -> int:
    """TrackerRun until standard input ends; returns the exit code."""
    request = json.loads(sys.stdin.readline())
    sys.argv = request["argv"]  # what the tracker shows as the run's command
    folder = Path(request["folder"])
    threading.Thread(target=outlive, args=(request,), daemon=True).start()
    with (folder / f"{request['tracker']}_id").open("a+") as id_file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(id_file, fcntl.LOCK_EX)  # the mirror of a killed training ends first
        try:
            copy = (wandb_copy if request["tracker"] == "wandb" else trackio_copy)(request)
            copy.record["made_of"] = request["made_of"]
            follow(folder, copy, request["trainer"])
            complete = sys.stdin.readline() == "complete\n"
            copy.finish(0 if complete else 1)
        except Exception as error:  # whatever it is: the training reads it in tracker.json
            reason = one_line(error)
            try:
                tell(folder, stopped=reason)
            except OSError:  # the disk takes nothing
                say(f"the tracker stopped: {reason}")
            return 1
    return 0


def outlive(request: dict[str, Any]) -> None:
    """End this process some time after the training, whatever the tracker is waiting for."""
    while os.getppid() == request["trainer"]:
        time.sleep(POLL_SECONDS)
    time.sleep(request["patience"])
    os._exit(1)


def follow(folder: Path, copy: TrackerRun, trainer: int) -> None:
    """Pass lines of metrics.jsonl on until the training has ended."""
    tell(folder, after=copy.after, stopped=None, **copy.record)
    with (folder / "metrics.jsonl").open() as file:
        ended = False
        while not ended:
            ended = training_ended(trainer)  # before the lines are read, so that none is missed
            fresh = [line for line in whole_lines(file) if place(line) > copy.after]
            if fresh:
                copy.after = place(fresh[-1])
                tell(folder, after=copy.after)  # first: better a line missing than one twice
            for line in fresh:
                copy.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])


def training_ended(trainer: int) -> bool:
    """Wait for the next look at the file; True when standard input has something to say."""
    readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
    return bool(readable) or os.getppid() != trainer


def whole_lines(file: IO[str]) -> Iterator[dict[str, Any]]:
    """The lines that are complete; the next call goes on behind them."""
    while True:
        position = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(position)
            return
        yield json.loads(line)


def place(line: dict[str, Any]) -> Place:
    """Where a line stands in metrics.jsonl."""
    return int(line["step"]), int(any(key.startswith("eval/") for key in line))


def wandb_copy(request: dict[str, Any]) -> TrackerRun:
    """A W&B run under the id of the run's folder; offline without a key or an answer."""
    import wandb

    folder = Path(request["folder"])
    id_file = folder / "wandb_id"
    if not id_file.read_text():
        id_file.write_text(secrets.token_hex(4))
    run_id = id_file.read_text().strip()

    settings = wandb.Settings(
        init_timeout=request["online_seconds"],
        x_stats_pid=request["trainer"],
        program=request["argv"][0],
        console="off",
    )

    def init(mode: Any) -> Any:
        return wandb.init(
            **request["run"], id=run_id, resume="allow", mode=mode, dir=str(folder),
            settings=settings,
        )  # fmt: skip

    mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    try:
        run = init(mode)
    except Exception as error:
        if mode != "online":
            raise
        say(f"W&B does not take the run ({one_line(error)}); it goes on offline")
        wandb.teardown()  # the service thinks the run is in use
        mode = "offline"
        run = init(mode)
    data = [Path(run.dir).parent]
    if mode == "offline":
        data = sorted(data[0].parent.glob(f"offline-run-*-{run_id}"))
    sync = shlex.join(["wandb", "sync", *map(str, data)])
    record = {"tracker": "wandb", "id": run_id, "url": None, "sync": sync}
    if mode == "online":
        record["url"], after = run.url, (run.starting_step, -1)
    else:
        after = copied(folder, "wandb", run_id)
        say(f"W&B is offline; upload later with: {sync}")
    return TrackerRun(run.log, lambda code: run.finish(exit_code=code), record, after)


def trackio_copy(request: dict[str, Any]) -> TrackerRun:
    """A trackio run; the same one when it is that of the run's folder."""
    import trackio

    folder = Path(request["folder"])
    id_file = folder / "trackio_id"
    known_id = id_file.read_text().strip()

    def init(resume: str) -> Any:
        return trackio.init(**request["run"], resume=resume)

    run = init("allow" if known_id else "never")
    if known_id and run.id != known_id:  # a run of the same name of another folder
        run = init("never")
    after = copied(folder, "trackio", run.id)
    id_file.write_text(run.id)
    record = {"tracker": "trackio", "id": run.id, "url": None, "sync": None}
    return TrackerRun(run.log, lambda _: run.finish(), record, after)


def copied(folder: Path, tracker: str, run_id: str) -> Place:
    """The last line that this run of this tracker was given."""
    record = read_tracker(folder)
    if (record.get("tracker"), record.get("id")) != (tracker, run_id):
        return (0, -1)
    step, evaluated = record["after"]
    return step, evaluated


def read_tracker(folder: Path) -> dict[str, Any]:
    """The content of tracker.json, or nothing."""
    try:
        record: dict[str, Any] = json.loads((folder / "tracker.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def tell(folder: Path, **changes: Any) -> None:
    """Update tracker.json, as a whole."""
    partial = folder / "tracker.json.partial"
    with partial.open("w") as file:
        file.write(json.dumps(read_tracker(folder) | changes, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / "tracker.json")


def has_wandb_key() -> bool:
    """Whether W&B could log in: WANDB_API_KEY, or ~/.netrc as `wandb login` writes it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    try:
        return netrc().authenticators(server.hostname or "") is not None
    except (OSError, NetrcParseError):
        return False


def one_line(error: Exception) -> str:
    """An error as the first line of what it says."""
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr)


if __name__ == "__main__":
    standard_error = LenientFile(2, "w", closefd=False)
    sys.stdout = sys.stderr = io.TextIOWrapper(standard_error, "utf-8", write_through=True)
    code = main()
    os._exit(code)  # W&B's own end would wait for a service that hangs
