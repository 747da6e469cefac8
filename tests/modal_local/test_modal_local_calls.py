"""Calls of the real client against the local control plane."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from modal_local.client import LocalModal
from modal_local.programs import Program, run_command

pytest_plugins = ["modal_local.fixtures"]
pytestmark = pytest.mark.usefixtures("needs_modal")

APP = """
import json, os, sys, time
import modal

app = modal.App("calls", tags={"sweep": "s1"})

@app.function(timeout=30)
def square(x):
    if x == 13:
        raise KeyError("thirteen")
    print("squaring", x, flush=True)
    return x * x

@app.function()
def where():
    return [modal.is_local(), modal.current_function_call_id(), modal.current_input_id()]

@app.function(timeout=1)
def slow(seconds):
    time.sleep(seconds)

@app.function()
def patient(seconds):
    time.sleep(seconds)

@app.function()
def big(n):
    return b"z" * n

@app.function()
def outer():
    return square.remote(5)

@app.cls()
@modal.concurrent(max_inputs=4)
class Engine:
    model: str = modal.parameter(default="m0")

    @modal.enter()
    def boot(self):
        self.booted = True

    @modal.method()
    def generate(self, prompt):
        return [self.model, prompt, self.booted]

    @modal.method()
    def stream(self, n):
        yield from range(n)

class Counter:
    pass

RETRY = modal.Retries(max_retries=3, initial_delay=0.0)
tries = modal.Dict.from_name("tries", create_if_missing=True)

@app.function(retries=RETRY)
def flaky(key, failures):
    n = tries.get(key, 0) + 1
    tries[key] = n
    if n <= failures:
        raise ValueError(f"try {n}")
    return n
"""


def test_a_call_has_the_lines_that_it_printed(run_program: Program) -> None:
    """They are there as soon as its result is, and no other call's."""
    found = run_program(
        APP,
        """
with app.run():
    calls = [square.spawn(x) for x in range(20, 60)]
    modal.FunctionCall.gather(*calls)
    print(json.dumps({"lines": [[str(e) for e in call.logs.tail(5)] for call in calls]}))
""",
    )
    for x, lines in enumerate(found["lines"], 20):
        assert [f"squaring {x}" in line for line in lines] == [True], x


def test_calls_and_their_results(run_program: Program, local_modal: LocalModal) -> None:
    found = run_program(
        APP,
        """
with app.run():
    calls = [square.spawn(x) for x in (2, 3)]
    gathered = modal.FunctionCall.gather(*calls)
    out = {
        "gather": gathered,
        "from_id": modal.FunctionCall.from_id(calls[1].object_id).get(timeout=5),
        "map": list(square.map(range(10))),
        "exceptions": [type(r).__name__ for r in square.map([1, 13], return_exceptions=True)],
        "where": where.remote(),
        "big": len(big.remote(3 << 20)),
        "engine": Engine(model="q").generate.remote("p"),
        "stream": list(Engine().stream.remote_gen(3)),
        "outer": outer.remote(),
        "local": modal.is_local(),
        "spawn_map": square.experimental_spawn_map(range(30)).get(index=29),
        "stats": square.get_current_stats().backlog,
        "graph": len(calls[0].get_call_graph()),
        "logs": [str(e) for e in calls[0].logs.tail(5)],
        "fetched": len(list(calls[0].logs.fetch())),
        "call": calls[0].object_id,
        "tags": app.get_tags(),
    }
    try:
        square.remote(13)
    except KeyError as error:
        out["error"] = str(error)
print(json.dumps(out))
""",
    )
    assert found["gather"] == [4, 9]
    assert found["from_id"] == 9
    assert found["map"] == [x * x for x in range(10)]
    assert found["exceptions"] == ["int", "KeyError"]
    assert found["where"][0] is False
    assert found["local"] is True
    assert found["where"][1].startswith("fc-")
    assert found["where"][2].startswith("in-")
    assert found["big"] == 3 << 20
    assert found["engine"] == ["q", "p", True]
    assert found["stream"] == [0, 1, 2]
    assert found["outer"] == 25
    assert found["spawn_map"] == 841
    assert found["stats"] == 0
    assert found["graph"] == 1
    assert any("squaring" in line for line in found["logs"])
    assert found["fetched"] >= 1
    assert found["tags"] == {"sweep": "s1"}
    assert "thirteen" in found["error"]
    state = local_modal.state()
    call = state["calls"][found["call"]]
    assert call["status"] == ["success"]
    assert call["starts"] == [1]
    assert state["counters"]["blobs_created"] >= 1


def test_retries_timeout_and_cancellation(run_program: Program, local_modal: LocalModal) -> None:
    found = run_program(
        APP,
        """
def outcome(call):
    try:
        return call.get()
    except BaseException as error:
        return type(error).__name__

with app.run():
    calls = {
        "flaky": flaky.spawn("a", 2),
        "broken": flaky.spawn("b", 9),
        "slow": slow.spawn(60),
        "cancelled": patient.spawn(60),
        "terminated": patient.spawn(61),
    }
    ids = {name: call.object_id for name, call in calls.items()}
    print(json.dumps(ids), flush=True)
    out = {name: outcome(calls[name]) for name in ("flaky", "broken", "slow")}
    from urllib.request import urlopen
    def running(name):
        state = json.load(urlopen(os.environ["MODAL_LOCAL_ADMIN"] + "/admin/state"))
        return state["calls"][ids[name]]["status"] == ["running"]
    while not (running("cancelled") and running("terminated")):
        time.sleep(0.05)
    time.sleep(0.5)
    calls["cancelled"].cancel()
    calls["terminated"].cancel(terminate_containers=True)
    out |= {name: outcome(calls[name]) for name in ("cancelled", "terminated")}
print(json.dumps([out, ids]))
""",
    )
    outcomes, ids = found
    assert outcomes["flaky"] == 3
    assert outcomes["broken"] == "ValueError"
    assert outcomes["slow"] == "FunctionTimeoutError"
    assert outcomes["cancelled"] == outcomes["terminated"] == "RemoteError"
    calls = local_modal.state()["calls"]
    assert calls[ids["flaky"]]["retries"] == [2]
    assert calls[ids["broken"]]["starts"] == [4]
    assert calls[ids["slow"]]["status"] == ["timeout"]
    assert calls[ids["cancelled"]]["status"] == ["terminated"]


VERSIONED = """
import json, sys, time
import modal

app = modal.App("versioned")

@app.function(max_containers=1)
def version(seconds=0):
    time.sleep(seconds)
    return {number}

@app.cls()
class Thing:
    @modal.method()
    def version(self):
        return {number}
"""


def test_versions_of_a_deployed_app(
    run_program: Program, local_modal: LocalModal, tmp_path: Path
) -> None:
    first = run_program(
        VERSIONED.format(number=1),
        """
app.deploy()
fn = modal.Function.from_name("versioned", "version")
print(json.dumps([fn.spawn(1).object_id, fn.spawn(0).object_id]))
""",
    )
    found = run_program(
        VERSIONED.format(number=2),
        """
app.deploy(tag="second")
get = modal.Function.from_name
out = {
    "current": get("versioned", "version").remote(),
    "one": get("versioned", "version", version=1).remote(),
    "two": get("versioned", "version", version=2).remote(),
    "queued": [modal.FunctionCall.from_id(i).get() for i in sys.argv[1:]],
    "class": modal.Cls.from_name("versioned", "Thing")().version.remote(),
    "lookup": modal.App.lookup("versioned").app_id,
}
try:
    get("versioned", "version", version=9).hydrate()
except modal.exception.NotFoundError as error:
    out["missing"] = str(error)
print(json.dumps(out))
""",
        *first,
    )
    assert found["current"] == found["two"] == found["class"] == 2
    assert found["one"] == 1
    assert found["queued"] == [1, 1]
    assert "version 9" in found["missing"]
    app = local_modal.state()["apps"][found["lookup"]]
    assert (app["name"], app["version"], sorted(app["versions"])) == ("versioned", 2, ["1", "2"])

    def cli(*arguments: str) -> str:
        command = [sys.executable, "-m", "modal", "app", *arguments]
        return run_command(local_modal, command, tmp_path)

    history = json.loads(cli("history", "versioned", "--json"))
    assert [row["version"] for row in history] == ["v2", "v1"]
    assert any("versioned" in json.dumps(row) for row in json.loads(cli("list", "--json")))
    cli("logs", "versioned")
    cli("rollback", "versioned", "v1")
    assert local_modal.state()["apps"][found["lookup"]]["version"] == 3
    cli("stop", "versioned", "--yes")
    assert "STOPPED" in local_modal.state()["apps"][found["lookup"]]["state"]


def test_options_are_visible(run_program: Program, local_modal: LocalModal) -> None:
    found: dict[str, Any] = run_program(
        """
import json, os
import modal

app = modal.App("options")
secret = modal.Secret.from_dict({"A": "1"})
volume = modal.Volume.from_name("options", create_if_missing=True, version=2)

@app.function(
    gpu=["H200:8", "H100:8"], timeout=77, cpu=2, memory=512, secrets=[secret],
    single_use_containers=True, retries=modal.Retries(max_retries=5, initial_delay=0.0),
    max_containers=3,
)
def f():
    return os.environ.get("MODAL_LOCAL_GPU"), os.environ.get("B"), os.path.isdir("/v")
""",
        """
with app.run():
    g = f.with_options(
        gpu="H100:4", timeout=88, cpu=1, memory=256, env={"B": "2"}, retries=2,
        max_containers=1, scaledown_window=20, volumes={"/v": volume}, region="us", cloud="aws",
    ).with_concurrency(max_inputs=2)
    print(json.dumps([f.object_id, g.hydrate().object_id, f.remote(), g.remote()]))
""",
    )
    base, variant, of_base, of_variant = found
    assert of_base == ["H200:8", None, False]
    assert of_variant == ["H100:4", "2", True]
    functions = local_modal.state()["functions"]
    assert functions[base]["gpu"] == ["H200:8", "H100:8"]
    assert functions[base]["timeout"] == 77
    assert functions[base]["cpu"] == 2
    assert functions[base]["memory"] == 512
    assert functions[base]["secrets"] == 1
    assert functions[base]["single_use"] is True
    assert functions[base]["retries"] == 5
    assert functions[base]["max_containers"] == 3
    changed = functions[variant]
    assert (changed["gpu"], changed["timeout"], changed["retries"]) == ("H100:4", 88, 2)
    assert (changed["cpu"], changed["memory"], changed["concurrency"]) == (1, 256, 2)
    assert (changed["max_containers"], changed["scaledown_window"]) == (1, 20)
    assert (changed["cloud"], changed["regions"], changed["base"]) == ("aws", ["us"], base)
    assert changed["volumes"]["/v"]["volume"] == "options"
