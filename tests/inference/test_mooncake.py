"""Mooncake's store: what was put is taken or said to be lost, and nobody comes in from outside."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from specforge_exp.errors import InputError
from specforge_exp.inference import store as stores
from specforge_exp.inference.cluster import end_leftovers, running, watch
from specforge_exp.inference.holder import hold
from specforge_exp.inference.store import (
    Bytes,
    LostStates,
    MooncakeStore,
    StateStore,
    check_mooncake,
)

pytestmark = pytest.mark.ray
SEGMENT = 32 * 2**20


def why_not() -> str:
    """What Mooncake lacks here; "" when it runs."""
    try:
        check_mooncake()
    except InputError as error:
        return str(error)
    return ""


NEEDS_MOONCAKE = pytest.mark.skipif(why_not() != "", reason=why_not())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mooncake")


@pytest.fixture(scope="module")
def master(folder: Path) -> Iterator[str]:
    """A master and a holder; afterwards the watcher leaves nothing of them."""
    watcher, ended = watch(folder), Event()
    address, started = hold(folder, SEGMENT, ended)
    [pid] = started.values()
    yield address
    ended.set()
    end_leftovers(watcher)
    assert not running(pid) and not folder.exists()


def holders(folder: Path) -> list[int]:
    """The processes that hold."""
    words = [str(folder).encode(), b"specforge_exp.inference.holder"]
    lines = {int(p.parent.name): p for p in Path("/proc").glob("[0-9]*/cmdline")}
    return [pid for pid, line in lines.items() if all(w in read(line) for w in words)]


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def some(*rows: int) -> list[Bytes]:
    """States of so many tokens each."""
    draw = np.random.default_rng(len(rows))
    return [draw.integers(0, 256, (number, 512), np.uint8) for number in rows]


@NEEDS_MOONCAKE
def test_what_is_put_is_taken_once(master: str) -> None:
    worker, trainer = MooncakeStore(master), MooncakeStore(master)
    for store in (worker, StateStore()):
        other = trainer if store is worker else store
        states = some(1, 700, 30)
        held = store.put("run-0/aa/0", states)
        back = other.take("run-0/aa/0", held)
        assert all(
            a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(states, back, strict=True)
        )
    assert held is states  # Ray's store copies nothing
    with pytest.raises(LostStates, match="has lost run-0/aa/0/0"):
        trainer.take("run-0/aa/0", [(1, 512), (700, 512), (30, 512)])


@NEEDS_MOONCAKE
def test_a_repeated_call_puts_the_same(master: str) -> None:
    worker, trainer = MooncakeStore(master), MooncakeStore(master)
    worker.put("run-0/aa/1", some(5, 6))
    held = MooncakeStore(master).put("run-0/aa/1", some(5, 6))  # the next worker of that name
    assert [len(array) for array in trainer.take("run-0/aa/1", held)] == [5, 6]


@NEEDS_MOONCAKE
def test_what_a_dead_trainer_asked_for_goes(master: str) -> None:
    """Its successor's first call removes it, and nothing of others."""
    worker = MooncakeStore(master)
    for key in ("run-1/aa/0", "run-11/aa/0", "run-1/bb/0", "run-1/bb/1"):
        worker.put(key, some(3))
    there = [worker.client.is_exist(f"{key}/0") for key in ("run-1/aa/0", "run-11/aa/0")]
    assert there == [0, 1]
    for key in ("run-11/aa/0", "run-1/bb/0", "run-1/bb/1"):
        assert len(worker.take(key, [(3, 512)])[0]) == 3


@NEEDS_MOONCAKE
def test_a_full_store_says_so_and_drops_nothing(
    master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put that returns holds; one that has no room waits, and then fails."""
    monkeypatch.setattr(stores, "PATIENCE", 0.3)
    worker = MooncakeStore(master)
    kept = 0
    with pytest.raises(LostStates, match=r"took no states for 0 s \(-200\)"):
        for kept in range(100):
            worker.put(f"run-2/aa/{kept}", some(4000))
    assert 10 <= kept <= SEGMENT // (4000 * 512)
    for number in range(kept):
        assert np.array_equal(worker.take(f"run-2/aa/{number}", [(4000, 512)])[0], some(4000)[0])
    with pytest.raises(LostStates):
        worker.put("run-2/aa/big", some(SEGMENT // 512 + 1))


@NEEDS_MOONCAKE
def test_another_object_in_its_place_is_not_taken(master: str) -> None:
    """What lies there ends in another name."""
    worker = MooncakeStore(master)
    [array] = some(9)
    whole = np.concatenate([array.reshape(-1), stores.mark("run-3/aa/8/0")])
    assert worker.client.put("run-3/aa/7/0", whole.data, worker.pinned) == 0
    with pytest.raises(LostStates):
        worker.take("run-3/aa/7", [array.shape])


@NEEDS_MOONCAKE
def test_a_holder_is_killed(master: str, folder: Path) -> None:
    """What it held is lost, and said to be; what is put then waits for the next one."""
    worker, trainer = MooncakeStore(master), MooncakeStore(master)
    held = worker.put("run-4/aa/0", some(8))
    [holder] = holders(folder)
    os.kill(holder, signal.SIGKILL)
    with pytest.raises(LostStates):
        trainer.take("run-4/aa/0", held)
    held = worker.put("run-4/aa/1", some(8))
    assert np.array_equal(trainer.take("run-4/aa/1", held)[0], some(8)[0])
    assert holders(folder) != [holder]


@NEEDS_MOONCAKE
def test_nothing_but_loopback_reaches_it(master: str, folder: Path) -> None:
    """Mooncake binds to all addresses; connections to another one than loopback are not let in."""
    with socket.socket(type=socket.SOCK_DGRAM) as towards:
        try:
            towards.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own = towards.getsockname()[0]
    until = time.monotonic() + 120
    while not (pids := holders(folder)) and time.monotonic() < until:
        time.sleep(0.05)
    client = MooncakeStore(master)
    ports = {port for pid in [*pids, os.getpid()] for port in open_ports(pid)}
    assert len(ports) >= 4 and client
    for port in ports:
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(OSError):
            socket.create_connection((own, port), 0.3)


def open_ports(pid: int) -> list[int]:
    """Ports on which a process accepts from all addresses, by what the kernel lists."""
    files = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    tables = [Path(f"/proc/net/{n}").read_text().splitlines()[1:] for n in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table]
    mine = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in files]
    return [int(a.split(":")[1], 16) for a in mine if set(a.split(":")[0]) == {"0"}]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """The package, or the library of the system that it needs."""
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").write_text("")
    code = "from specforge_exp.inference.store import check_mooncake; check_mooncake()"

    def said() -> str:
        words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
        return subprocess.run(words, capture_output=True, text=True, check=False).stderr

    assert "needs Mooncake: pip install 'specforge-exp[mooncake]'" in said()
    text = "raise ImportError('libibverbs.so.1: cannot open shared object file')"
    (tmp_path / "mooncake" / "store.py").write_text(text)
    assert "apt-get install libibverbs1" in said() and "libibverbs.so.1: cannot open" in said()
