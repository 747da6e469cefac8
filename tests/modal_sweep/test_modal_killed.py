"""A sweep outlives its launcher and the handles of its calls; with real training jobs."""

from pathlib import Path

import pytest
from modal_app import driver
from modal_local.client import LocalModal

pytestmark = pytest.mark.usefixtures("on_local_modal")
STEPS = 5


KILLS = [(at, when) for at in (1, 2, 3, 4) for when in ("before", "after")]
FAST = {(2, "before"), (3, "after")}  # one that is attached to, one that is launched again


@pytest.mark.parametrize(
    ("at", "when"),
    [pytest.param(*kill, marks=[] if kill in FAST else pytest.mark.slow) for kill in KILLS],
)
def test_a_killed_launcher_loses_nothing(
    at: int, when: str, tmp_path: Path, control_plane: LocalModal
) -> None:
    sweep = tmp_path / "sweep"
    names = {f"k{at}{when}{job}" for job in range(4)}
    command = driver.command(sweep, f"+name={','.join(sorted(names))}")
    killer = [str(driver.APP / "kill_at_spawn.py"), str(at), when]
    driver.run([*killer, *command], expect=-9)
    assert len(driver.events(sweep, "spawn")) == at - (when == "before")
    if at % 2:
        driver.run(command)
    else:
        driver.modal_sweep("attach", sweep)
    ended = driver.ends(sweep)
    assert sorted(ended) == [0, 1, 2, 3]
    assert {end["status"] for end in ended.values()} == {"completed"}
    executed = driver.steps_by_call(names, control_plane)
    assert set(executed) == names
    for calls in executed.values():
        assert list(calls.values()) == [list(range(STEPS))]


@pytest.mark.slow
def test_an_owner_that_was_cancelled_opens_the_next_generation(
    tmp_path: Path, held: Path, control_plane: LocalModal
) -> None:
    """Killed before its line in jobs.jsonl, a call goes on as the job's owner; then it is ended."""
    import modal

    sweep = tmp_path / "sweep"
    before = set(control_plane.state()["calls"])
    (held / "orphan").write_text("8")
    command = driver.command(sweep, "+name=orphan", "+pause=0.1", f"+hold={held}", steps=12)
    killer = [str(driver.APP / "kill_at_spawn.py"), "1", "before"]
    driver.run([*killer, *command], expect=-9)
    [orphan] = set(control_plane.state()["calls"]) - before
    control_plane.wait_for(lambda state: "STEP orphan 2" in driver.logs_of(orphan))
    modal.FunctionCall.from_id(orphan).cancel()
    control_plane.wait_for(lambda state: state["calls"][orphan]["done"])
    (held / "orphan").unlink()
    printed = driver.run(command)
    assert "runs again: its owner ended without a result" in printed
    [end] = driver.ends(sweep).values()
    assert (end["status"], end["generation"]) == ("completed", 1)


def test_expired_handles(tmp_path: Path, control_plane: LocalModal) -> None:
    """The Volume has the result; without one the job runs again as the next generation."""
    sweep = tmp_path / "sweep"
    command = driver.command(sweep, "+name=expired0,expired1", "hydra.launcher.detach=true")
    driver.run(command)
    calls = [event["call"] for event in driver.events(sweep, "spawn")]
    control_plane.wait_for(lambda state: all(state["calls"][call]["done"] for call in calls))
    for call in calls:
        control_plane.expire(call)
    identity = driver.events(sweep, "plan")[1]["identity"]
    remove_result(sweep, identity)
    driver.modal_sweep("attach", sweep)
    ended = driver.ends(sweep)
    assert {end["status"] for end in ended.values()} == {"completed"}
    assert [ended[job]["generation"] for job in (0, 1)] == [0, 1]
    assert ended[0]["value"] == ended[1]["value"]


def remove_result(sweep: Path, identity: str) -> None:
    """As if the container had been lost before its commit."""
    import modal

    [entry] = driver.events(sweep, "sweep")
    volume = modal.Volume.from_name(entry["volume"])
    volume.remove_file(f"{entry['id']}/{identity}.0", recursive=True)
