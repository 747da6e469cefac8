"""Faults on request, and what survives them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modal_local.client import LocalModal, State, start
from modal_local.programs import Program, environment, program_command

pytest_plugins = ["modal_local.fixtures"]
pytestmark = pytest.mark.usefixtures("needs_modal")

APP = """
import json, os, signal, subprocess, sys, time
import modal

app = modal.App("faults")
volume = modal.Volume.from_name("faults", create_if_missing=True, version=2)
claims = modal.Dict.from_name("claims", create_if_missing=True)

@app.function(volumes={"/ckpt": volume}, max_containers=4)
def train(name, steps, seconds):
    path = f"/ckpt/{name}"
    done = int(open(path).read()) if os.path.exists(path) else 0
    for step in range(done, steps):
        time.sleep(seconds)
        while step == steps // 2 and not claims.get("go"):  # until both are lost
            time.sleep(0.1)
        with open(path + ".new", "w") as file:
            file.write(str(step + 1))
        os.replace(path + ".new", path)
        volume.commit()
    return done

@app.function()
def interrupted():
    code = (
        "import signal, sys, time\\n"
        "signal.signal(signal.SIGINT, lambda *a: print('the child got SIGINT', flush=True))\\n"
        "print('child ready', flush=True)\\n"
        "time.sleep(60)\\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        if claims.put("first", 1, skip_if_exists=True):
            time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        print("main got SIGINT", "child alive:", child.poll() is None, flush=True)
        raise
    child.kill()
    return "second"

@app.function(single_use_containers=True)
def claim(key):
    return claims.put(key, os.environ["MODAL_TASK_ID"], skip_if_exists=True)

@app.function()
def wait(seconds):
    time.sleep(seconds)
    return "waited"

@app.function()
def wait_until(key):
    while True:
        try:
            if claims.get(key):
                return "waited"
        except Exception:  # the control plane is away
            pass
        time.sleep(0.1)
"""


def call_states(state: State, status: str) -> list[str]:
    """Return the calls that have an input of some status."""
    return [i for i, call in state["calls"].items() if status in call["status"]]


def test_preemption_interrupts_the_main_process_only(
    start_program: Program, local_modal: LocalModal
) -> None:
    process = start_program(
        APP,
        """
        claims.pop("first", None)
        with app.run():
            call = interrupted.spawn()
            print(call.object_id, flush=True)
            result = call.get()
            logs = [str(entry) for entry in call.logs.fetch()]
        print(json.dumps([result, logs]))
        """,
    )
    call = process.stdout.readline().strip()

    def ready(state: State) -> str | None:
        tasks = state["tasks"].items()
        return next((i for i, t in tasks if call in t["calls"]), None)

    def claimed(state: State) -> bool:
        return state["rpcs"].get("DictUpdate", 0) > before and ready(state) is not None

    before = local_modal.state()["rpcs"].get("DictUpdate", 0)
    task = ready(local_modal.wait_for(claimed))
    assert task is not None
    local_modal.preempt(task)
    result, logs = json.loads(process.communicate(timeout=300)[0].splitlines()[-1])
    assert result == "second"
    assert any("main got SIGINT child alive: True" in line for line in logs)
    assert not any("the child got SIGINT" in line for line in logs)
    found = local_modal.state()["calls"][call]
    assert (found["starts"], found["preemptions"], found["retries"]) == ([2], 1, [0])


COMMITTED = """
left = {"one", "two"}
while left:
    for name in list(left):
        try:
            if int(b"".join(volume.read_file(name))) > 1:
                left.remove(name)
        except FileNotFoundError:
            pass
    time.sleep(0.1)
print("null")
"""
"""Ends when both jobs have left steps on the Volume."""


def test_killed_driver_and_lost_containers(
    start_program: Program, run_program: Program, local_modal: LocalModal, tmp_path: Path
) -> None:
    ids_file = tmp_path / "ids.json"
    driver = start_program(
        APP,
        """
        app.deploy()
        fn = modal.Function.from_name("faults", "train").with_options(gpu="H100:4")
        claims.pop("go", None)
        ids = [fn.spawn(name, 40, 0.1).object_id for name in ("one", "two")]
        print(json.dumps(ids), flush=True)
        time.sleep(60)
        """,
    )
    ids = json.loads(driver.stdout.readline())
    ids_file.write_text(json.dumps(ids))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()

    def tasks(state: State) -> dict[str, str]:
        return {t["calls"][0]: i for i, t in state["tasks"].items() if set(t["calls"]) & set(ids)}

    run_program(APP, COMMITTED)
    state = local_modal.state()
    found = tasks(state)
    assert state["tasks"][found[ids[0]]]["gpu"] == 4
    local_modal.preempt(found[ids[0]])
    local_modal.kill(found[ids[1]])
    resumed = run_program(
        APP,
        """
        claims["go"] = True
        print(json.dumps([modal.FunctionCall.from_id(i).get() for i in sys.argv[1:]]))
        """,
        *ids,
    )
    assert all(0 < step < 40 for step in resumed)
    calls = local_modal.state()["calls"]
    assert calls[ids[0]]["preemptions"] == 1
    assert calls[ids[1]]["crashes"] == [1]
    local_modal.expire(ids[0])
    outcome = run_program(
        APP,
        """
        try:
            out = modal.FunctionCall.from_id(sys.argv[1]).get(timeout=5)
        except modal.exception.OutputExpiredError:
            out = "expired"
        print(json.dumps(out))
        """,
        ids[0],
    )
    assert outcome == "expired"


def test_results_expire_with_time(tmp_path: Path) -> None:
    main = """
        with app.run():
            call = wait.spawn(0)
            first = call.get()
            deadline = time.time() + 120
            while time.time() < deadline:
                try:
                    call.get(timeout=0)
                except modal.exception.OutputExpiredError:
                    print(json.dumps([first, "expired"]))
                    break
        """
    with start(options={"result_ttl": 0.5}) as server:
        command = program_command(tmp_path, APP, main)
        output = subprocess.check_output(command, env=environment(server), text=True, timeout=300)
    assert json.loads(output.splitlines()[-1]) == ["waited", "expired"]


def test_outage_while_a_call_runs(
    start_program: Program, run_program: Program, local_modal: LocalModal
) -> None:
    process = start_program(
        APP,
        """
        app.deploy(name="outage")
        claims.pop("over", None)
        call = modal.Function.from_name("outage", "wait_until").spawn("over")
        print(call.object_id, flush=True)
        deadline = time.time() + 300
        errors = 0
        while time.time() < deadline:
            try:
                print(json.dumps([call.get(), errors]))
                break
            except (modal.exception.ConnectionError, ConnectionError, OSError) as error:
                errors += 1
                time.sleep(0.2)
        """,
    )
    call = process.stdout.readline().strip()
    local_modal.wait_for(lambda s: s["calls"][call]["status"] == ["running"])
    local_modal.down(3)
    run_program(
        APP,
        """
        while True:
            try:
                claims["over"] = True
                break
            except Exception:  # still down
                time.sleep(0.1)
        print("null")
        """,
    )
    result, _ = json.loads(process.communicate(timeout=300)[0].splitlines()[-1])
    assert result == "waited"
    found = local_modal.state()["calls"][call]
    assert (found["starts"], found["crashes"]) == ([1], [0])


def test_refused_and_delayed_answers(run_program: Program, local_modal: LocalModal) -> None:
    local_modal.fail("FunctionMap", count=2)
    local_modal.delay("FunctionGetOutputs", seconds=0.3, count=1)
    main = """
        with app.run():
            call = wait.spawn(0)
            print(json.dumps([call.get(), call.object_id]))
        """
    before = local_modal.state()["rpcs"].get("FunctionMap", 0)
    result, _ = run_program(APP, main)
    assert result == "waited"
    assert local_modal.state()["rpcs"]["FunctionMap"] == before + 3


def test_only_one_of_two_containers_claims_a_key(
    run_program: Program, local_modal: LocalModal
) -> None:
    won = run_program(
        APP,
        """
        keys = [f"key-{number}" for number in range(3)]
        with app.run():
            calls = [[claim.spawn(key) for _ in range(2)] for key in keys]
            print(json.dumps([[call.get() for call in pair] for pair in calls]))
        """,
    )
    assert [sorted(pair) for pair in won] == [[False, True]] * 3


def test_command_line_returns_the_status_of_its_command() -> None:
    folder = Path(__file__).parents[1]

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "modal_local", "--secret", "a:B=c", "--", *command]
        return subprocess.run(
            line, cwd=folder, capture_output=True, text=True, check=False, timeout=300
        )

    assert run("sh", "-c", "exit 3").returncode == 3
    assert run("sh", "-c", "kill -INT $PPID; exec sleep 300").returncode == 130
    assert run("sh", "-c", "kill -TERM $PPID; exec sleep 300").returncode == 143
    assert "http://127.0.0.1:" in run("sh", "-c", "echo $MODAL_SERVER_URL").stdout
    code = """
import modal
try:
    modal.NetworkFileSystem.from_name("n", create_if_missing=True).hydrate()
except Exception:
    pass
"""
    done = run(sys.executable, "-c", code)
    assert "modal_local: unimplemented: SharedVolumeGetOrCreate x1" in done.stderr
