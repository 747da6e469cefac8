"""Programs of `warm`: each starts as Python, of which only the standard library is read."""

import os
import sys
from inspect import getsource
from pathlib import Path

from modal_local.orders import give

GIVE = getsource(give)

SPARED = """#!{python} -IS
from __future__ import annotations
import json, os, select, signal, socket, sys
{give}
words = sys.argv[1:]
asked = next((at for at, word in enumerate(words) if word in ("-c", "-m")), len(words))
text = words[asked + 1] if asked + 1 < len(words) else ""
addresses = {addresses} if text.startswith({begins!r}) else []
files = [int(name) for name in os.listdir("/proc/self/fd")]
files = [file for file in files if os.path.exists(f"/proc/self/fd/{{file}}")]
order = {{"words": words[asked:], "cwd": os.getcwd(), "env": dict(os.environ), "files": files}}
order["session"] = os.getsid(0) == os.getpid()
for address in addresses:
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        give(connection, order, files)
        pid = int(connection.recv(64))
    except (OSError, ValueError):  # it is used, or gone
        continue
    end = os.pidfd_open(pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for file in files:
        os.close(file)
    select.select([end], [], [])
    os._exit(0)
os.execv({python!r}, [{python!r}, *words])
"""
"""A program that is Python, but for what begins as `begins`: a spare process becomes that, one that
listens at one of the `addresses`."""

STARTED = """#!{python} -IS
from __future__ import annotations
import json, os, signal, socket, sys
{give}
words = [word for word in sys.argv[1:] if word != "-u"]
if not words or os.path.basename(words[words[0] == "-m"]) not in {scripts}:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
order = {{"words": words, "cwd": os.getcwd(), "env": dict(os.environ), "session": True}}
connection = socket.socket(socket.AF_UNIX)
connection.connect({server!r})
give(connection, {{**order, "bound": True}}, [0, 1, 2])
received = b""
while b"\\n" not in received:
    received += connection.recv(64)
pid, received = received.split(b"\\n", 1)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(int(pid), number))
while b"\\n" not in received:
    received += connection.recv(64)
code = int(received)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""
"""A program that is Python, but starts some scripts as forks, which end with it."""


def program(path: str, text: str, **values: object) -> str:
    """Write a program that can be run, at once; its path."""
    file = Path(f"{path}.{os.getpid()}")
    file.write_text(text.format(python=sys.executable, give=GIVE, **values))
    file.chmod(0o755)
    file.rename(path)
    return path
