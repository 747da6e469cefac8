"""Mooncake's two processes beside a cluster: a master, which knows where things lie, and a holder.

    python -m specforge_exp.inference.holder MASTER BYTES FOLDER

The holder lends its memory to all and does nothing else, so that no worker's death loses states.
When it dies another one is started; what it held is asked for again. Both name the cluster's
folder, by which `leftovers` ends them.
"""

import logging
import os
import select
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread

from specforge_exp.errors import InputError
from specforge_exp.inference.store import LOOPBACK, connect

log = logging.getLogger(__name__)

MASTER = "MOONCAKE_MASTER"
"""Environment variable, Mooncake's own: the master of a cluster of several machines."""
STARTS = 5
WAIT = 20.0
"""Seconds in which a process must be up."""
ROOT = Path(__file__).parents[2]
LOG = "mooncake.log"
Process = subprocess.Popen[bytes]


def hold(folder: Path | None, size: int, ended: Event) -> tuple[str, dict[str, int]]:
    """Something that holds states of so many bytes until `ended` is set.

    Args:
        folder: the cluster's; null: it is there already, and so is a master.
        size: of a holder's memory; 0: Ray holds them.
        ended: the cluster is about to end.

    Returns:
        The master's address, "" without one, and its process by name if it was started.

    Raises:
        InputError: they do not start, or nothing says where the master is.
    """
    if not size:
        return "", {}
    if folder is None:
        if MASTER not in os.environ:
            raise InputError(
                f"target.store=mooncake with RAY_ADDRESS needs {MASTER}=HOST:PORT, see docs/ray.md"
            )
        return os.environ[MASTER], {}
    for _ in range(STARTS):
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            address = f"{LOOPBACK}:{probe.getsockname()[1]}"
        master = start_master(folder, address)
        holder = start_holder(folder, address, size)
        if holder and master.poll() is None:
            keep = folder, address, size, ended, holder, master
            Thread(target=keep_holding, args=keep, daemon=True).start()
            return address, {"Mooncake's master": master.pid}
        for process in filter(None, (holder, master)):
            process.kill()
            process.wait()
    said = (folder / LOG).read_text().strip().splitlines()
    raise InputError(f"Mooncake does not start: {said[-1][:300] if said else 'no answer'}")


def start_master(folder: Path, address: str) -> Process:
    """A master on loopback."""
    package = find_spec("mooncake")
    assert package and package.origin
    port = address.rpartition(":")[2]
    return start(
        folder, subprocess.DEVNULL, str(Path(package.origin).with_name("mooncake_master")),
        f"--rpc_address={LOOPBACK}", f"--rpc_port={port}", f"--metrics_host={LOOPBACK}",
        "--metrics_port=0", "--minloglevel=2", f"--log_dir={folder}",
    )  # fmt: skip


def start(folder: Path, output: int, *command: str) -> Process:
    """A process of the cluster's; what it reports goes to the log, what it prints to `output`."""
    with (folder / LOG).open("ab") as log_file:
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=log_file,
            start_new_session=True,
        )  # fmt: skip


def start_holder(folder: Path, address: str, size: int) -> Process | None:
    """A holder that is up; None when it does not come."""
    words = ("-m", "specforge_exp.inference.holder", address, str(size), str(folder))
    holder = start(folder, subprocess.PIPE, sys.executable, *words)
    assert holder.stdout
    if select.select([holder.stdout], [], [], WAIT)[0] and holder.stdout.readline():
        return holder
    holder.kill()
    holder.wait()
    return None


def keep_holding(
    folder: Path, address: str, size: int, ended: Event, holder: Process | None, master: Process
) -> None:
    """Start a holder again whenever it dies, as long as there is a master."""
    while not ended.wait(0.5) and master.poll() is None:
        if holder is None or holder.poll() is not None:
            log.warning("train: Mooncake's holder of states has ended; another takes its place")
            holder = start_holder(folder, address, size)
    for process in filter(None, (holder, master)):
        process.wait()


def main() -> None:
    """Hold memory until killed."""
    master, size = sys.argv[1:3]
    until = time.monotonic() + WAIT / 2
    while True:
        try:
            client = connect(master, int(size))
            break
        except InputError:  # it has just been started
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    print("up", flush=True)
    Event().wait()
    client.close()


if __name__ == "__main__":
    main()
