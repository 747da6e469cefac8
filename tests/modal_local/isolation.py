"""The first process of a container; runs inside `unshare`, or as a fork that has unshared, on the
standard library alone.

It builds a root of its own on a tmpfs, enters it, starts the main process, passes signals on and
reaps orphans. It dies with its standard input, so a control plane that is killed takes its
containers along, and as it is process 1 of a PID namespace, all others die with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import sys
import threading
from typing import Any, NoReturn

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MS_FLAGS = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048}
MS_RELATIME = 1 << 21
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
SYS_MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP_RUNNING = 0x8913, 0x8914, 0x41
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "opt", "sys")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
FRESH = ("tmp", "var/tmp", "root", "run", "home", "mnt", "srv", "proc", "dev/shm")
libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0) -> None:
    """Call mount(2)."""
    code = [text.encode() if text is not None else None for text in (source, target, kind)]
    if libc.mount(code[0], code[1], code[2], ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target}: {os.strerror(number)}")


def make_read_only(target: str) -> None:
    """Make a bind mount and all mounts below it read-only."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    done = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, len(attributes)
    )
    if done == 0:
        return
    # Kernels before 5.12: one by one, and with the flags that a user namespace may not drop.
    with open("/proc/self/mountinfo") as file:
        rows = [line.split(" ", 6) for line in file]
    for row in rows:
        place = row[4].encode().decode("unicode_escape")
        if place == target or place.startswith(target + "/"):
            flags = sum(MS_FLAGS.get(name, 0) for name in row[5].split(","))
            if "relatime" in row[5].split(","):
                flags |= MS_RELATIME
            mount(None, place, None, MS_BIND | MS_REMOUNT | MS_RDONLY | flags)


def bind(source: str, target: str, *, read_only: bool) -> None:
    """Bind a file or folder, making its place."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "a"):
            pass
    mount(source, target, None, MS_BIND | MS_REC)
    if read_only:
        make_read_only(target)


def build_root(spec: dict[str, Any]) -> None:
    """Fill the tmpfs on `spec["root"]`: nothing in it can be written by anyone else."""
    root = spec["root"]
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV)
    for name in SYSTEM:
        path = f"/{name}"
        if os.path.islink(path):
            os.symlink(os.readlink(path), f"{root}{path}")
        elif os.path.isdir(path):
            bind(path, f"{root}{path}", read_only=True)
    for name in FRESH:
        os.makedirs(f"{root}/{name}", exist_ok=True)
    for name in ("tmp", "var/tmp", "dev/shm"):
        os.chmod(f"{root}/{name}", 0o1777)
    for name in DEVICES:
        if os.path.exists(f"/dev/{name}"):
            bind(f"/dev/{name}", f"{root}/dev/{name}", read_only=False)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"{root}/dev/{name}")
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for prefix in dict.fromkeys(spec["prefixes"]):
        if prefix.split("/")[1] not in SYSTEM:
            bind(prefix, root + prefix, read_only=True)
    for source, target, mode in spec["files"]:
        os.makedirs(os.path.dirname(root + target), exist_ok=True)
        shutil.copyfile(source, root + target)
        os.chmod(root + target, mode & 0o777)
    binds = [(*pair, True) for pair in spec["readonly"]]
    binds += [(*pair, False) for pair in spec["writable"]]
    for source, target, read_only in sorted(binds, key=lambda item: item[1].count("/")):
        bind(source, root + target, read_only=read_only)


def enter_root(root: str) -> None:
    """Make `root` the root folder and lose sight of the old one."""
    os.chdir(root)
    if libc.pivot_root(b".", b".") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    if libc.umount2(b".", MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), "umount of the old root")
    os.chdir("/")


def raise_loopback() -> None:
    """Bring up the only network interface of a new network namespace."""
    with socket.socket() as handle:
        name = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(handle, SIOCGIFFLAGS, name))[1]
        request = struct.pack("16sh14x", b"lo", flags | IFF_UP_RUNNING)
        fcntl.ioctl(handle, SIOCSIFFLAGS, request)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def _forward(listening: socket.socket, port: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pipe(reader, inner_writer), _pipe(inner_reader, writer))

    server = await asyncio.start_unix_server(connected, sock=listening)
    await server.serve_forever()


def start_forwarder(listening: socket.socket, port: int) -> None:
    """Fork a process that carries connections of a host's socket to a port in here."""
    if os.fork() == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (0, 1, 2):
            os.close(number)
        asyncio.run(_forward(listening, port))
        os._exit(0)
    listening.close()


def begin(spec: dict[str, Any]) -> int:
    """Build the container around this process and fork its main process, in a session of its own;
    that one's id here, and 0 in there."""
    listening = None
    if forward := spec.get("forward"):
        raise_loopback()
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(forward[0])
        listening.listen(128)
    build_root(spec)
    enter_root(spec["root"])
    if forward and listening:
        start_forwarder(listening, forward[1])
    os.makedirs(spec["cwd"], exist_ok=True)
    pid = os.fork()
    if not pid:
        os.setsid()
        empty = os.open("/dev/null", os.O_RDONLY)
        os.dup2(empty, 0)
        os.close(empty)
        os.chdir(spec["cwd"])
    return pid


def obey(main: int) -> None:
    """Pass on the signals that arrive as lines `NUMBER main|group`; die at the end of input."""
    for line in sys.stdin:
        number, target = line.split()
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if target == "group" else os.kill)(main, int(number))
    os._exit(128 + signal.SIGKILL)


def reap(main: int) -> int:
    """Wait for the main process and return its exit status; collect orphans meanwhile."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == main:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def guard(main: int) -> NoReturn:
    """Be the first process of a container until its main process has ended."""
    threading.Thread(target=obey, args=(main,), daemon=True).start()
    os._exit(reap(main))


def run() -> NoReturn:
    """Run the specification that the first argument names."""
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    if main := begin(spec):
        guard(main)
    try:
        os.execv(spec["argv"][0], spec["argv"])
    except OSError as error:
        os.write(2, f"modal_local: {spec['argv'][0]}: {error}\n".encode())
    os._exit(127)


if __name__ == "__main__":
    run()
