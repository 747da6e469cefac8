"""One folder, one writer, on whichever machine.

`.<name>.lease` beside a folder says who writes it. On one machine its lock decides, which ends with
the process, however that ends. Locks of other machines may not be seen, so the file also has a
beat: a number that changes every BEAT seconds. One that stands still for PATIENCE is of a process
that is gone, and the file is taken over. No artifact's name begins with a dot: the file is part of
none, and readers do not need it.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specforge_exp.errors import InputError

log = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two versions of the file."""
PATIENCE = 20.0
"""Seconds without a beat after which a holder on another machine is gone."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
BYTES = 1024
"""Of the file: it is written over and never cut, so that no reader finds it empty."""

Holder = dict[str, Any]
"""host, machine, pid, started, token and beat of a writer."""


@contextmanager
def lease(folder: Path, wait: bool = False) -> Iterator[None]:
    """Be the only writer of `folder` while the block runs.

    Args:
        folder: what is written; it need not exist.
        wait: until another writer has ended; else it is refused.

    Raises:
        InputError: another process writes it; names host and process.
    """
    path = folder.with_name(f".{folder.name}.lease")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = take(path)
    if file is None:
        said = f"another process writes {folder}: {name(holder_of(path))}"
        if not wait:
            raise InputError(f"{said}; wait for it, or end it and run the same command")
        log.info("%s; waiting for it", said)
        while file is None:
            time.sleep(0.5)
            file = take(path)
    me = {
        "host": socket.gethostname(), "machine": machine(), "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "token": secrets.token_hex(8),
    }  # fmt: skip
    ended = threading.Event()
    keeper = threading.Thread(target=keep, args=(path, file, me, ended), daemon=True)
    try:
        with suppress(OSError):  # a full disk: there is still the lock
            write(file, {**me, "beat": 0})
        keeper.start()
        forget_dead(folder)
        yield
    finally:
        ended.set()
        keeper.join()
        path.unlink(missing_ok=True)  # before the lock goes
        os.close(file)


def forget_dead(folder: Path) -> None:
    """Remove `<name>.<pid>.partial` (see `records`) that killed processes left in a folder, or of
    it where it is a file. Who writes there without the lease, on another machine, at this instant,
    fails: its file is gone before it has its name. So are the `.tmp...` of safetensors."""
    for path in folder.glob(".tmp*"):
        path.unlink(missing_ok=True)
    for path in [*folder.glob("*.partial"), *folder.parent.glob(f"{folder.name}.*.partial")]:
        pid = path.name.split(".")[-2]
        if not pid.isdigit() or path.is_dir():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (PermissionError, OverflowError):
            continue


def take(path: Path) -> int | None:
    """Descriptor of the file, locked; None when somebody holds it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        locks = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:  # a file system without locks
            locks = False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                holder = holder_of(path)
                if not holder or (locks and holder.get("machine") == machine()):
                    return file
                if beats(path, holder):
                    os.close(file)
                    return None
                log.info("%s: %s is gone; taken over", path, name(holder))
                return file
        os.close(file)  # its holder has removed it meanwhile


def beats(path: Path, holder: Holder) -> bool:
    """Whether what the file says changes within PATIENCE seconds."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(BEAT / 10)
        if holder_of(path) != holder:
            return True
    return False


def keep(path: Path, file: int, me: Holder, ended: threading.Event) -> None:
    """Beat until the block has ended. A process that was taken for gone (it was stopped, or away
    from the network) must not write any more: it ends at once, as by a kill."""
    number = 0
    while not ended.wait(BEAT):
        number += 1
        with suppress(OSError):  # the next beat may get through
            if (other := holder_of(path)) and other.get("token") != me["token"]:
                os.write(2, f"error: {path} was taken over by {name(other)}\n".encode())
                os._exit(1)
            write(file, {**me, "beat": number})


def write(file: int, holder: Holder) -> None:
    """Put a holder into the file, whole."""
    os.pwrite(file, json.dumps(holder).encode().ljust(BYTES), 0)
    os.fsync(file)


def holder_of(path: Path) -> Holder:
    """What the file says; {} where it says nothing."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        holder: Holder = json.loads(content)
    except ValueError:  # somebody's, half of it
        holder = {"beat": content.hex()} if content else {}
    return holder


def name(holder: Holder) -> str:
    """Process and host, and since when it writes."""
    return "process {pid} on {host} since {started}".format_map(defaultdict(lambda: "?", holder))


def machine() -> str:
    """What tells this machine's kernel from others, between which locks may not be seen."""
    return BOOT.read_text().strip() if BOOT.exists() else socket.gethostname()
