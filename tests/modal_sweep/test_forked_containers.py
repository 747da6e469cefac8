"""Containers that are forks are what those are that start cold."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import warm_containers
from modal_app import driver
from modal_local import orders
from modal_local.client import LocalModal
from modal_local.programs import program_command, run_command

LOOKING = str(driver.APP / "looking.py")
APP = """
import json, os, resource, signal, sys, threading, urllib.request
import modal

app = modal.App("alike")

image = modal.Image.debian_slim().pip_install(sys.argv[1]) if modal.is_local() else None

@app.function(single_use_containers=True, image=image)
def look(package):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    mounts = [line.split() for line in open("/proc/self/mountinfo")]
    file = lambda number: os.readlink(f"/proc/self/fd/{number}").partition(":")[0]
    found = {
        "environment": {k: v for k, v in os.environ.items() if k != "MODAL_TASK_ID"},
        "python": [sys.argv, sys.path, sys.executable, str(sys.flags), __name__],
        "streams": [str(each) for each in (sys.stdin, sys.stdout, sys.stderr)],
        "through": [sys.stdout.write_through, sys.stderr.write_through],
        "files": [file(number) for number in (0, 1, 2)],
        "handlers": {n: str(signal.getsignal(n)) for n in (2, 13, 15, 17)},
        # Without the C library's own two, which posix_spawn leaves ignored (Python 3.13 uses it).
        "signals": [int(status[name], 16) & ~(3 << 31) for name in ("SigBlk", "SigIgn")],
        "rights": [status[name] for name in ("CapEff", "Seccomp")],
        "ids": [os.getpid(), os.getppid(), os.getsid(0), os.getpgid(0), os.getuid(), os.getgid()],
        "maps": [open(f"/proc/self/{name}").read().split() for name in ("uid_map", "gid_map")],
        "groups": open("/proc/self/setgroups").read(),
        "limits": [resource.getrlimit(number) for number in range(16)],
        "mounts": sorted([mount[4], mount[5]] for mount in mounts if "/run/modal" not in mount[4]),
        "folders": [sorted(os.listdir(name)) for name in ("/", "/root", "/tmp", "/dev", "/home")],
        "network": os.readlink("/proc/self/ns/net"),
        "cwd": [os.getcwd(), os.umask(0o22), os.nice(0)],
        "oom": open("/proc/self/oom_score_adj").read(),
        "modules": sorted(
            name for name, module in sys.modules.items()
            if (file := getattr(module, "__file__", None) or "")[:1] == "/"
            and not file.startswith((sys.prefix, sys.base_prefix))
        ),
        "computes": package == "torch" and __import__("torch").get_num_threads(),
        "threads": [os.cpu_count(), len(os.listdir("/proc/self/task"))],
    }
    return json.loads(json.dumps(found, default=str))

def cold(yes):
    url = f"{os.environ['MODAL_LOCAL_ADMIN']}/admin/cold?cold={yes}"
    urllib.request.urlopen(urllib.request.Request(url, method="POST")).close()
"""
MAIN = """
    with app.run():
        found = [look.remote(*sys.argv[1:])]
        found.append(look.with_options(env={"PYTHONHASHSEED": "0"}).remote(*sys.argv[1:]))
        cold(1)
        found.append(look.remote(*sys.argv[1:]))
        cold(0)
    print(json.dumps(found))
"""


@pytest.mark.usefixtures("on_local_modal")
@pytest.mark.parametrize("package", ["modal", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_fork_is_what_a_cold_start_is(
    package: str, tmp_path: Path, control_plane: LocalModal
) -> None:
    """What a Python that starts would do otherwise is a cold start in any case."""
    before = control_plane.state()["counters"]
    command = program_command(tmp_path, APP, MAIN, package)
    warm, seeded, cold = json.loads(run_command(control_plane, command, tmp_path).splitlines()[-1])
    after = control_plane.state()["counters"]
    assert after["containers_started"] - before["containers_started"] == 3
    if control_plane.state()["isolation"] != "plain":
        assert after["containers_forked"] - before["containers_forked"] == 1
    assert seeded["environment"].pop("PYTHONHASHSEED") == "0"
    assert warm == cold
    assert seeded["environment"] == warm["environment"]


@pytest.mark.slow
@pytest.mark.usefixtures("on_local_modal")
def test_a_forked_job_server_is_what_a_cold_one_is(
    tmp_path: Path, control_plane: LocalModal
) -> None:
    found = []
    try:
        for cold in (False, True):
            control_plane.cold(cold)
            before = control_plane.state()["counters"]
            sweep = tmp_path / f"cold_{cold}"
            driver.run([LOOKING, "-m", "hydra/launcher=modal", f"hydra.sweep.dir={sweep}"])
            [end] = driver.ends(sweep).values()
            after = control_plane.state()["counters"]
            forked = after["containers_forked"] - before["containers_forked"]
            said = json.dumps(end["value"]["json"]).replace(str(sweep), "SWEEP")
            found.append((json.loads(said), forked))
    finally:
        control_plane.cold(False)
    (warm, forked), (cold, not_forked) = found
    assert warm == cold
    assert not not_forked and (forked or control_plane.state()["isolation"] == "plain")


def test_an_order_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads it may answer and end before the orderer's next step."""
    ours, theirs = socket.socketpair()
    send, received = socket.send_fds, []

    def sent_and_answered(connection: socket.socket, text: list[bytes], files: Any) -> int:
        sent = send(connection, text, files)
        order, numbers = orders.receive(theirs)
        received.extend([order, len(numbers)])
        theirs.sendall(b"7\n")
        theirs.close()
        return sent

    monkeypatch.setattr(socket, "send_fds", sent_and_answered)
    with ours:
        orders.give(ours, {"words": ["x"]}, [0, 1])
        assert ours.recv(64) == b"7\n"
    assert received == [{"words": ["x"]}, 2]


def test_whose_environment_is_read_while_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_containers, "read", {"HF_HOME", "TMPDIR", "HOME"})
    alike, same = warm_containers.alike, warm_containers.ENVIRONMENT
    assert alike(same | {"MINE": "1", "PYTHONPATH": "/root"})
    assert alike(same | {"HF_HOME": "/root/.cache/huggingface"})  # what it is without
    for name in ("HF_HOME", "TMPDIR", "HOME", "OMP_NUM_THREADS", "LC_ALL", "PYTHONHASHSEED"):
        assert not alike(same | {name: "/other"}), name
    assert not alike({name: same[name] for name in same if name != "OMP_NUM_THREADS"})
