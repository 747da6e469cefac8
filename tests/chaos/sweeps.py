"""Faults of whole sweeps: the launcher killed here, containers lost on a local Modal."""

from __future__ import annotations

import json
import os
import random
import time
from typing import TYPE_CHECKING, Any

from commands import orphans
from faults import World

if TYPE_CHECKING:
    from modal_local.client import LocalModal

LOSSES = ("baseline", "full-opd")


def values(world: World, place: str) -> dict[str, Any]:
    """What each run of a sweep returned, by its name's last word."""
    record = json.loads((world.work / "checkpoints" / "sweeps" / place / "sweep.json").read_text())
    return {run["name"].rpartition("_")[2]: run["value"] for run in record["runs"]}


def words(world: World, sweep: str, *more: str) -> list[str]:
    """Two trainings of one sweep, side by side.

    On Modal the folders here are named by the environment: an option would be the jobs' too.
    """
    own = world.words("train")[1:]
    if "hydra/launcher=modal" in more:
        own = [word for word in own if not word.startswith("paths.")]
        places = ("datasets", "checkpoints")
        os.environ.update({f"SPECFORGE_{name.upper()}": str(world.work / name) for name in places})
    name = f"run_name={sweep}_${{loss.name}}"
    losses = "loss=" + ",".join(LOSSES)
    return [
        "train", "-m", *own, f"sweep_name={sweep}", name, losses, *more
    ]  # fmt: skip


def finished(world: World, sweep: str, command: list[str], undisturbed: dict[str, Any]) -> None:
    """The same command again ends well, with the undisturbed values and no process left."""
    last = world.run(command)
    assert last.code == 0, last.text()
    assert "Traceback" not in last.text(), last.text()
    assert values(world, f"{sweep}/train") == undisturbed
    deadline = time.monotonic() + 120
    while lines := orphans(world.work):
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)


def killed_launcher(world: World, number: int, chance: random.Random) -> str:
    """Both jobs run at a time; the launcher is killed, once or twice."""
    sweep = f"l{number}"
    command = words(world, sweep, "hydra/launcher=basic", "hydra.sweeper.n_jobs=2")
    moments = []
    for _ in range(chance.randint(1, 2)):
        moment = chance.uniform(0.0, 1.0) * world.seconds["sweep"]
        launcher = world.start(command)
        while not launcher.ended() and time.monotonic() - launcher.began < moment:
            time.sleep(0.002)
        launcher.kill()
        moments.append(f"{moment:.2f} s")
    finished(world, sweep, command, world.undisturbed)
    return f"launcher killed after {', '.join(moments)}"


def lost_container(world: World, number: int, chance: random.Random, plane: LocalModal) -> str:
    """On a local Modal: a container is killed or preempted, or the launcher is killed."""
    sweep = f"m{number}"
    os.environ.update(plane.env)
    command = words(world, sweep, "hydra/launcher=modal")
    before = set(plane.state()["tasks"])
    launcher = world.start(command)
    plane.wait_for(lambda state: launcher.ended() or set(state["tasks"]) - before, 120)
    moment = chance.uniform(0.0, 12.0)
    deadline = time.monotonic() + moment
    while not launcher.ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    tasks = sorted(set(plane.state()["tasks"]) - before)
    what = chance.choice(("killed", "preempted", "launcher killed"))
    if what == "launcher killed":
        launcher.kill()
    elif tasks:
        (plane.kill if what == "killed" else plane.preempt)(chance.choice(tasks))
    launcher.wait()
    finished(world, sweep, command, world.undisturbed)
    return f"{what} after {moment:.1f} s"
