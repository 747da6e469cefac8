"""What holds states between worker and trainer: Ray, or Mooncake in a process of its own.

Ray's store keeps what a call returns until its caller forgets it. Mooncake's keeps it under a name
in the memory of a *holder*, and what crosses Ray is only its shape. The trainer chooses the names,
so that a call that is repeated after a death puts the same ones.

Mooncake is made as a cache, hence: objects are pinned, as others vanish without a word when it is
full; a removal is forced, as one that was read a moment ago stays; what is read must end in its own
name, as another may lie where a holder has died. Nothing here loads torch.
"""

import ctypes
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specforge_exp.errors import InputError

Bytes = NDArray[np.uint8]
LOOPBACK = "127.0.0.1"
INSTALL = "pip install 'specforge-exp[mooncake]' (in a checkout: pip install -e '.[mooncake]')"
STAGING = 16 * 2**20
"""Bytes of a client's own buffer, which nothing uses: states cross from where they lie."""
NAME = 64
"""Bytes in which an object ends: its name."""
PATIENCE = 30.0
"""Seconds that a worker tries to put states: a dead holder is offered for ten."""
PAUSE = 0.2
SO_ATTACH_FILTER = 26
NETWORK_HEADER = 0xFFF00000
LISTENS = "0A"


class LostStates(Exception):
    """The store does not have states any more, or takes none; they can be computed again."""


class StateStore:
    """Holds the states of a call, one array for each conversation: Ray's, where they are what the
    call returns, and go when the trainer forgets the answers."""

    def put(self, key: str, states: list[Bytes]) -> list[Any]:
        """In a worker: keep them; what to return for each. LostStates when there is no room."""
        return states

    def take(self, key: str, held: list[Any]) -> list[Bytes]:
        """In a trainer: what was put, which is forgotten. LostStates when it is not there."""
        return held

    def forget(self, key: str, number: int) -> None:
        """In a trainer: remove what so many conversations may have left."""


class MooncakeStore(StateStore):
    """A client of a master, with no memory for others.

    Args:
        master: its address.
    """

    def __init__(self, master: str) -> None:
        from mooncake.store import ReplicateConfig

        self.client = connect(master)
        self.pinned = ReplicateConfig()
        self.pinned.with_hard_pin = True
        self.tokens: dict[str, str] = {}

    def put(self, key: str, states: list[Bytes]) -> list[Any]:
        """The shapes."""
        owner, token, _ = key.rsplit("/", 2)
        if self.tokens.get(owner) != token:  # it was started again: what it had asked for is left
            self.client.remove_by_regex(f"^{re.escape(owner)}/(?!{token}/)", True)
            self.tokens[owner] = token
        for number, array in enumerate(states):
            self.put_one(f"{key}/{number}", array)
        return [array.shape for array in states]

    def put_one(self, name: str, states: Bytes) -> None:
        """One array and its name."""
        whole = np.concatenate([states.reshape(-1), mark(name)])
        until = time.monotonic() + PATIENCE
        with self.known(whole) as address:
            self.client.remove(name, True)  # of the call before, whose worker died
            while code := self.client.put_from(name, address, whole.nbytes, self.pinned):
                if time.monotonic() > until:
                    raise LostStates(f"Mooncake took no states for {PATIENCE:.0f} s ({code})")
                time.sleep(PAUSE)
                self.client.remove(name, True)

    def take(self, key: str, held: list[Any]) -> list[Bytes]:
        """The states, in memory of their own."""
        try:
            return [self.take_one(f"{key}/{number}", shape) for number, shape in enumerate(held)]
        finally:
            self.forget(key, len(held))

    def take_one(self, name: str, shape: tuple[int, ...]) -> Bytes:
        """One array of this shape."""
        size = int(np.prod(shape))
        whole = np.empty(size + NAME, np.uint8)
        with self.known(whole) as address:
            code = self.client.get_into(name, address, whole.nbytes)
        if code != whole.nbytes or not np.array_equal(whole[size:], mark(name)):
            raise LostStates(f"Mooncake has lost {name} ({code})")
        return whole[:size].reshape(shape)

    def forget(self, key: str, number: int) -> None:
        """Remove the objects, whoever has just read them."""
        self.client.batch_remove([f"{key}/{i}" for i in range(number)], True)

    @contextmanager
    def known(self, data: Bytes) -> Iterator[int]:
        """Memory that Mooncake reads from or writes to; its address."""
        address = data.ctypes.data
        if code := self.client.register_buffer(address, data.nbytes):
            raise LostStates(f"Mooncake refuses a buffer of {data.nbytes} bytes ({code})")
        try:
            yield address
        finally:
            self.client.unregister_buffer(address)


def mark(name: str) -> Bytes:
    """What an object of this name ends in."""
    return np.frombuffer(name.encode()[-NAME:].rjust(NAME), np.uint8)


def store_at(master: str) -> StateStore:
    """Ray's store, or that of Mooncake's master at an address."""
    return MooncakeStore(master) if master else StateStore()


def connect(master: str, segment: int = 0) -> Any:
    """A client of a master, which offers so many bytes to all.

    Where the master is on loopback nothing else can reach the client either.

    Raises:
        InputError: no master answers, or this machine cannot keep others out.
    """
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    from mooncake.store import MooncakeDistributedStore

    client, before = MooncakeDistributedStore(), set(listening())
    host, port = master.rsplit(":", 1)
    alone = host == LOOPBACK
    given = {} if alone else os.environ
    transport = given.get("MOONCAKE_PROTOCOL", "tcp"), given.get("MOONCAKE_DEVICE", "")
    with socket.socket(type=socket.SOCK_DGRAM) as towards, silent():
        towards.connect((host, int(port)))  # sends nothing
        own = towards.getsockname()[0]
        code = client.setup(own, "P2PHANDSHAKE", segment, STAGING, *transport, master)
    if code:
        raise InputError(f"no Mooncake master answers at {master} ({code})")
    if alone:
        for number in set(listening()) - before:
            fence(number)
    hush()
    return client


def listening() -> Iterator[int]:
    """Descriptors of this process on which it accepts connections."""
    tables = [Path("/proc/self/net", name).read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[3] == LISTENS}
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one of this listing
            if os.readlink(file) in sockets:
                yield int(file.name)


def fence(number: int) -> None:
    """Let only connections to 127.* reach a socket: Mooncake binds to all addresses, whatever it is
    told, and asks nobody who they are.

    Raises:
        InputError: the kernel cannot filter.
    """
    # Accepts IPv4 whose destination begins with 127, in the kernel's own little language.
    steps = [
        (0x30, 0, 0, NETWORK_HEADER), (0x54, 0, 0, 0xF0), (0x15, 0, 3, 0x40),
        (0x30, 0, 0, NETWORK_HEADER + 16), (0x15, 0, 1, 127), (0x06, 0, 0, 0xFFFFFFFF),
        (0x06, 0, 0, 0),
    ]  # fmt: skip
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    where = struct.pack("@HP", len(steps), ctypes.addressof(program))
    with socket.socket(fileno=os.dup(number)) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, where)
        except OSError as error:
            raise InputError(
                f"target.store=mooncake: this kernel keeps nobody from Mooncake's sockets ({error})"
                "; target.store=ray"
            ) from None


def hush() -> None:
    """Keep Mooncake from writing between our lines; its answers say what went wrong."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libglog" in line:
            library = ctypes.CDLL(line.split(maxsplit=5)[5])
            with suppress(ValueError):  # another build of it
                ctypes.c_int.in_dll(library, "_ZN3fLI17FLAGS_minloglevelE").value = 3  # fatal
            return


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is written to the standard error, by libraries either."""
    stderr = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def check_mooncake() -> None:
    """Refuse target.store=mooncake where it cannot run.

    Raises:
        InputError: the package or the system's library is missing.
    """
    try:
        import mooncake.store  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(f"target.store=mooncake needs Mooncake: {INSTALL}") from None
    except ImportError as error:
        raise InputError(
            f"target.store=mooncake: Mooncake does not load ({error}); its library of the system: "
            "apt-get install libibverbs1"
        ) from None
