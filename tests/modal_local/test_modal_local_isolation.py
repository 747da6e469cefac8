"""What containers see, and what they leave behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from modal_local.client import LocalModal, start
from modal_local.programs import Program, environment, program_command, run_command

pytest_plugins = ["modal_local.fixtures"]
pytestmark = pytest.mark.usefixtures("needs_modal")
REPOSITORY = Path(__file__).resolve().parents[2]

APP = """
import json, os, subprocess, sys, time
import modal

app = modal.App("isolation")
volume = modal.Volume.from_name("isolated", create_if_missing=True, version=2)

def refused(action):
    try:
        action()
    except OSError as error:
        return error.strerror
    return ""

@app.function(volumes={"/home/someone/runs": volume})
def look(repository, marker):
    os.makedirs("/home/x/y")
    os.makedirs(os.path.join(repository, "multirun"))
    with open("/root/program.py", "a") as file:
        file.write("# changed")
    mounts = [line.split() for line in open("/proc/self/mountinfo")]
    return {
        "repository": sorted(os.listdir(repository)),
        "marker": os.path.exists(marker),
        "tmp": os.listdir("/tmp"),
        "shm": os.listdir("/dev/shm"),
        "venv": refused(lambda: open(os.path.join(sys.prefix, "new"), "w")),
        "usr": refused(lambda: open("/usr/new", "w")),
        "etc": refused(lambda: open("/etc/new", "w")),
        "python": refused(lambda: open(os.path.join(sys.base_prefix, "new"), "w")),
        "proc": open("/proc/self/comm").read().strip() != "",
        "null": open("/dev/null", "w").write("x"),
        "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
        "volume": refused(lambda: open("/home/someone/runs/file", "w").close()),
        "writable": [m[4] for m in mounts if "rw" in m[5].split(",")],
        "environment": sorted(os.environ),
        "shell": subprocess.check_output(["sh", "-c", "echo $((6*7))"], text=True).strip(),
    }

@app.function()
def family():
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(300)"],
        start_new_session=True, stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    print("child is up", flush=True)
    time.sleep(300)
"""


def host_processes(marker: str) -> list[int]:
    """Return the processes whose command line holds a text."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            content = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if marker.encode() in content:
            found.append(int(pid))
    return found


def descendants(pid: int) -> list[int]:
    """Return all processes below one."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    below = [int(number) for number in text.split()]
    return below + [deep for child in below for deep in descendants(child)]


def test_a_container_sees_only_its_own(
    run_program: Program, isolated_modal: LocalModal, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    main = """
        os.environ["LEAK"] = "1"
        with app.run():
            print(json.dumps(look.remote(*sys.argv[1:])))
        """
    found = run_program(APP, main, str(REPOSITORY), str(marker))
    inside = Path(sys.prefix).is_relative_to(REPOSITORY)
    parents = [Path(sys.prefix).relative_to(REPOSITORY).parts[0]] if inside else []
    assert found["repository"] == sorted([*parents, "multirun"])
    assert found["marker"] is False
    below_tmp = Path(sys.prefix).parts[2:3] if sys.prefix.startswith("/tmp/") else ()
    assert found["tmp"] == list(below_tmp)  # the interpreter is there wherever it lies
    assert found["shm"] == []
    for place in ("venv", "usr", "etc", "python"):
        assert found[place] == "Read-only file system", place
    assert found["proc"] is True
    assert found["null"] == 1
    assert found["processes"] < 5
    assert found["volume"] == ""
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
    assert set(found["writable"]) - devices == {"/", "/proc", "/home/someone/runs"}
    assert "LEAK" not in found["environment"]
    assert found["shell"] == "42"
    assert not (tmp_path / "program.py").read_text().endswith("# changed")
    assert not (REPOSITORY / "multirun").exists()


def test_a_killed_container_takes_its_descendants_along(
    start_program: Program, isolated_modal: LocalModal
) -> None:
    start_program(APP, "with app.run(detach=True): family.spawn().get()")

    def task_of(state: dict) -> str | None:
        tasks = state["tasks"].items()
        return next((i for i, t in tasks if t["tag"] == "family" and t["calls"]), None)

    state = isolated_modal.wait_for(task_of)
    task = task_of(state)
    assert task is not None
    pid = state["tasks"][task]["pid"]
    isolated_modal.wait_for(lambda _: len(descendants(pid)) == 1)
    family = [pid, *descendants(pid)]
    app = next(
        i for i, a in state["apps"].items() if a["name"] == "isolation" and "DETACHED" in a["state"]
    )
    isolated_modal.kill(task)
    isolated_modal.wait_for(lambda _: not any(Path(f"/proc/{p}").exists() for p in family))
    # The crash put the input back; stopping the app ends that.
    command = [sys.executable, "-m", "modal", "app", "stop", app, "--yes"]
    run_command(isolated_modal, command, Path.cwd())
    isolated_modal.wait_for(lambda s: not any(t["tag"] == "family" for t in s["tasks"].values()))


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_the_end(
    ending: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = Path(tempfile.mkdtemp())
    monkeypatch.setenv("TMPDIR", str(temporary))
    mounts = Path("/proc/self/mountinfo").read_text()
    with start() as server:
        if server.state()["isolation"] == "plain":
            pytest.skip(f"no namespaces: {server.state()['isolation_reason']}")
        main = "with app.run(): family.remote()"
        driver = subprocess.Popen(
            program_command(tmp_path, APP, main), env=environment(server), stderr=subprocess.DEVNULL
        )
        try:
            state = server.wait_for(lambda s: any(t["calls"] for t in s["tasks"].values()))
            (task,) = state["tasks"].values()
            server.wait_for(lambda _: len(descendants(task["pid"])) == 1)
            family = [task["pid"], *descendants(task["pid"])]
            server.process.send_signal(ending)
            server.process.wait(timeout=300)
        finally:
            driver.kill()
            driver.wait()
        for _ in range(2400):
            alive = [pid for pid in family if Path(f"/proc/{pid}").exists()]
            alive += host_processes(str(temporary))
            if not alive:
                break
            signal.sigtimedwait([], 0.05)
        assert alive == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    if ending == signal.SIGTERM:  # nobody can tidy up after a SIGKILL
        temporary.rmdir()
    else:
        shutil.rmtree(temporary)


def test_shared_paths_are_writable(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    app = """
        import modal

        app = modal.App("share")

        @app.function()
        def write(path):
            with open(path + "/file", "w") as file:
                file.write("from the container")
        """
    main = f"with app.run(): write.remote({str(shared)!r})"
    with start(share=[shared]) as server:
        run_command(server, program_command(tmp_path, app, main), tmp_path)
    assert (shared / "file").read_text() == "from the container"


def test_plain_mode_runs_and_leaves_no_links(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "volume"
    app = f"""
        import json, os
        import modal

        app = modal.App("plain")
        volume = modal.Volume.from_name("plain", create_if_missing=True, version=2)

        @app.function(volumes={{{str(place)!r}: volume}})
        def write():
            with open({str(place)!r} + "/file", "w") as file:
                file.write("1")
            volume.commit()
        """
    main = """
        with app.run():
            write.remote()
        print(json.dumps([e.path for e in volume.listdir("/")]))
        """
    with start(options={"isolation": "plain"}) as server:
        state = server.state()
        assert (state["isolation"], state["isolation_reason"]) == ("plain", "asked for")
        output = run_command(server, program_command(tmp_path, app, main), tmp_path)
        assert json.loads(output.splitlines()[-1]) == ["file"]
        server.wait_for(lambda s: not s["tasks"])
        assert not place.parent.exists()


def test_the_server_ends_with_the_process_that_started_it() -> None:
    source = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from modal_local.client import start
print(start().process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    line = [sys.executable, "-c", source, str(Path(__file__).parents[1])]
    output = subprocess.run(
        line, stdout=subprocess.PIPE, text=True, timeout=300, check=False
    ).stdout
    status = Path(f"/proc/{int(output)}/stat")
    for _ in range(2400):
        try:
            gone = status.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            gone = True
        if gone:
            break
        signal.sigtimedwait([], 0.05)
    assert gone
