"""Programs of `warm`: each starts as Python, of which only the standard library is read."""

SPARED = """#!{python} -IS
import json, os, select, signal, socket, sys
words = sys.argv[1:]
owner, count = os.environ.get("WARM_SPARES", "0 0").split()
if not words[-1].startswith("from multiprocessing.forkserver "):
    count = 0
files = [int(name) for name in os.listdir("/proc/self/fd")]
files = [file for file in files if os.path.exists(f"/proc/self/fd/{{file}}")]
for number in range(int(count)):
    taken = f"{{sys.argv[0]}}.{{os.getpid()}}.{{number}}"
    order = {{"words": words[-2:], "cwd": os.getcwd(), "env": dict(os.environ), "files": files}}
    order["taken"] = taken
    text = json.dumps(order).encode() + b"\\n"
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"\\0warm-{{owner}}-{{number}}")
        sent = socket.send_fds(connection, [text], files)
        if sent < len(text):  # nothing more is an error where who answers has already gone on
            connection.sendall(text[sent:])
        pid = int(connection.recv(64))
    except (OSError, ValueError):  # it is used, or gone
        try:
            os.symlink("0", taken)
            continue
        except FileExistsError:
            pid = int(os.readlink(taken))
    end = os.pidfd_open(pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for file in files:
        os.close(file)
    select.select([end], [], [])
    os._exit(0)
os.execv({python!r}, [{python!r}, *words])
"""
"""A program that is Python, but for a fork server, which a spare process of its parent becomes."""

STARTED = """#!{python} -IS
import json, os, signal, socket, sys
words = [word for word in sys.argv[1:] if word != "-u"]
if not words or os.path.basename(words[0]) not in {scripts}:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
order = {{"words": words, "cwd": os.getcwd(), "env": dict(os.environ), "session": True}}
text = json.dumps({{**order, "bound": True}}).encode() + b"\\n"
connection = socket.socket(socket.AF_UNIX)
connection.connect({server!r})
sent = socket.send_fds(connection, [text], [0, 1, 2])
if sent < len(text):
    connection.sendall(text[sent:])
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
