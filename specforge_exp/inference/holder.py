"""Mooncake's two processes beside a cluster: a master, which knows where things lie, and a holder.

    python -m specforge_exp.inference.holder MASTER BYTES FOLDER

The holder lends its memory to all and does nothing else, so that no worker's death loses states.
When it dies another one is started; what it held is asked for again. Both name the cluster's
folder, by which `leftovers` ends them.
"""

import logging
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


def start_mooncake(folder: Path, size: int, stop: Event) -> tuple[str, int]:
    """A master, and a holder of so many bytes until `stop` is set; the master's address and
    process.

    Raises:
        InputError: they do not start.
    """
    for _ in range(STARTS):
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = probe.getsockname()[1]
        address = f"{LOOPBACK}:{port}"
        master = start_master(folder, port)
        holder = start_holder(folder, address, size) if answers(master, port) else None
        if holder:
            keep = (folder, address, size, stop, holder, master)
            Thread(target=keep_holding, args=keep, daemon=True).start()
            return address, master.pid
        master.kill()
        master.wait()
    said = (folder / "mooncake.log").read_text().strip().splitlines()
    raise InputError(f"Mooncake does not start: {said[-1][:300] if said else 'no answer'}")


def start_master(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A master on loopback."""
    package = find_spec("mooncake")
    assert package and package.origin
    command = [
        str(Path(package.origin).with_name("mooncake_master")), f"--rpc_address={LOOPBACK}",
        f"--rpc_port={port}", f"--metrics_host={LOOPBACK}", "--metrics_port=0", "--minloglevel=2",
        f"--log_dir={folder}",
    ]  # fmt: skip
    with (folder / "mooncake.log").open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def answers(master: subprocess.Popen[bytes], port: int) -> bool:
    """Whether a master is there, within `WAIT`."""
    until = time.monotonic() + WAIT
    while master.poll() is None and time.monotonic() < until:
        with socket.socket() as trial:
            if trial.connect_ex((LOOPBACK, port)) == 0:
                return True
        time.sleep(0.05)
    return False


def start_holder(folder: Path, address: str, size: int) -> subprocess.Popen[bytes] | None:
    """A holder that is up; None when it does not come."""
    command = [sys.executable, "-m", __name__, address, str(size), str(folder)]
    with (folder / "mooncake.log").open("ab") as output:
        holder = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    assert holder.stdout
    with holder.stdout as said:
        if select.select([said], [], [], WAIT)[0] and said.readline():
            return holder
    holder.kill()
    holder.wait()
    return None


def keep_holding(
    folder: Path, address: str, size: int, stop: Event,
    holder: subprocess.Popen[bytes] | None, master: subprocess.Popen[bytes],
) -> None:  # fmt: skip
    """Start a holder again whenever it dies, as long as there is a master."""
    while not stop.is_set() and master.poll() is None:
        if holder is None or holder.poll() is not None:
            log.warning("train: Mooncake's holder of states has ended; another takes its place")
            holder = start_holder(folder, address, size)
        stop.wait(0.5)
    for process in (holder, master):
        if process:
            process.wait()


def main() -> None:
    """Hold memory until killed."""
    master, size = sys.argv[1:3]
    client = connect(master, int(size))
    print("up", flush=True)
    Event().wait()
    client.close()


if __name__ == "__main__":
    main()
