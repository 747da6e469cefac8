"""Drive sweeps of the toy app on a local Modal, and read what became of them."""

import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import warm
from modal_local.client import LocalModal

from modal_sweep.protocol.records import whole_lines

APP = Path(__file__).resolve().parent
REPOSITORY = APP.parent.parent
sys.path.append(str(APP))  # where the jobs find what they share
STEP = re.compile(r"STEP (\S+) (\d+) (\S+)")


def command(sweep: Path, *overrides: str, steps: int = 5) -> list[str]:
    """The toy's sweep on Modal."""
    flags = ["-m", "hydra/launcher=modal", f"hydra.sweep.dir={sweep}", "hydra.launcher.poll=0.2"]
    volume = "+hydra.launcher.volumes={/runs:toy-runs}"
    return [str(APP / "toy.py"), *flags, volume, f"+steps={steps}", *overrides]


def run(arguments: list[str], expect: int = 0) -> str:
    """Run Python to its end; everything it printed."""
    return finish(start(arguments), expect)


def start(arguments: list[str]) -> warm.Started:
    """Start Python in this process's folder."""
    kind = "stages" if arguments[0] == "train.py" else "modal"
    return warm.start(arguments, os.getcwd(), together=True, kind=kind)


def finish(process: warm.Started, expect: int = 0) -> str:
    """Wait for a process; everything it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expect, output
    return output


def modal_sweep(name: str, *arguments: object, expect: int = 0) -> str:
    """A command of modal-sweep."""
    module = ["-m", "modal_sweep", name]
    return run([*module, *(str(one) for one in arguments)], expect)


def events(sweep: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind in a sweep's journal."""
    lines = whole_lines(sweep / "modal" / "jobs.jsonl")
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def ends(sweep: Path) -> dict[int, dict[str, Any]]:
    """The newest end of every job, by number."""
    numbers = {plan["identity"]: plan["job"] for plan in events(sweep, "plan")}
    return {numbers[end["identity"]]: end for end in events(sweep, "end")}


def logs_of(call: str) -> str:
    """What Modal logged for a call."""
    import modal

    entries = modal.FunctionCall.from_id(call).logs.fetch()
    return "".join(str(getattr(entry, "text", entry)) for entry in entries)


def steps_by_call(names: set[str], control_plane: LocalModal) -> dict[str, dict[str, list[int]]]:
    """Every step that any call ever executed, from Modal's own logs: job -> call -> steps."""
    steps: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for call in control_plane.state()["calls"]:
        for name, step, _ in STEP.findall(logs_of(call)):
            if name in names:
                steps[name][call].append(int(step))
    return steps


def running(control_plane: LocalModal, sweep: Path) -> dict[str, str]:
    """Containers that run a sweep's calls: task -> call."""
    calls = {event["call"] for event in events(sweep, "spawn")}
    tasks = control_plane.state()["tasks"]
    return {name: call for name, task in tasks.items() for call in task["calls"] if call in calls}


def wait_for_steps(control_plane: LocalModal, sweep: Path, jobs: int, steps: int) -> dict[str, str]:
    """Wait until every job has taken a few steps; its containers."""

    def all_have(state: dict[str, Any]) -> bool:
        tasks = running(control_plane, sweep)
        return len(tasks) == jobs and all(
            logs_of(call).count("STEP") >= steps for call in tasks.values()
        )

    control_plane.wait_for(all_have)
    return running(control_plane, sweep)
