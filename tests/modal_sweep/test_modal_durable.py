"""A sweep outlives its containers and its control plane; with real training jobs."""

from pathlib import Path

import pytest
from modal_app import driver, toy
from modal_local.client import LocalModal

pytestmark = pytest.mark.usefixtures("on_local_modal")


@pytest.fixture(scope="module")
def undisturbed() -> list[float]:
    """Losses of the toy's steps without any accident."""
    return list(toy.fit(toy.begun(0), 0, 16))


@pytest.mark.parametrize("accident", ["preempt", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_lost_container_costs_only_what_was_not_saved(
    accident: str,
    tmp_path: Path,
    held: Path,
    control_plane: LocalModal,
    undisturbed: list[float],
) -> None:
    sweep = tmp_path / "sweep"
    options = [
        "hydra.launcher.single_use=true",
        "+resources.progress_file=/runs/${name}/progress.jsonl",
        f"+hold={held}",
    ]
    names = [f"{accident}0", f"{accident}1"]
    for name in names:
        (held / name).write_text("8")
    named = f"+name={','.join(names)}"
    process = driver.start(driver.command(sweep, named, "+pause=0.3", *options, steps=16))
    for task in driver.wait_for_steps(control_plane, sweep, jobs=2, steps=4):
        getattr(control_plane, accident)(task)
    for name in names:
        (held / name).unlink()
    driver.finish(process)
    ended = driver.ends(sweep).values()
    assert [end["value"]["json"] for end in ended] == [undisturbed[-1]] * 2
    assert {end["attempt"] for end in ended} == {2}
    for end in ended:
        logged = driver.STEP.findall(driver.logs_of(end["call"]))
        taken = [(int(step), float(loss)) for _, step, loss in logged]
        numbers = [step for step, _ in taken]
        assert sorted(set(numbers)) == list(range(16))
        if accident == "preempt":  # at most the interrupted step begins twice
            assert numbers == sorted(numbers) and len(numbers) <= 17
        assert all(loss == pytest.approx(undisturbed[step], abs=1e-8) for step, loss in taken)


def test_jobs_that_break_do_not_hide_the_others(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    output = driver.run(driver.command(sweep, "+name=fine,raises,exits,notanumber"), expect=1)
    ended = driver.ends(sweep)
    statuses = [ended[job]["status"] for job in range(4)]
    assert statuses == ["completed", "failed", "failed", "failed"]
    assert ended[1]["error"]["message"] == "a job that raises"
    assert "exited with code 7" in ended[2]["error"]["message"]
    assert ended[3]["error"]["type"] == "NotANumber"
    assert "1 of 4 jobs completed" in output
    for job, reason in enumerate(("a job that raises", "code 7", "NaN"), 1):
        [line] = [
            line
            for line in output.splitlines()
            if line.startswith(f"job {job} ") and "failed after" in line
        ]
        assert reason in line
    assert (sweep / "0" / "weights.txt").read_text().startswith("[")
    log = driver.modal_sweep("logs", sweep, 1)
    assert "STEP raises 2" in log and "Traceback" in log


@pytest.mark.slow
def test_a_full_volume_fails_the_job_and_says_so(tmp_path: Path, control_plane: LocalModal) -> None:
    sweep = tmp_path / "sweep"
    options = ["+name=full", "hydra.launcher.volume=full-sweeps"]
    import modal

    modal.Volume.from_name("full-sweeps", create_if_missing=True, version=2).hydrate()
    control_plane.full_volume("full-sweeps")
    output = driver.run(driver.command(sweep, *options), expect=1)
    assert driver.ends(sweep)[0]["error"]["type"] == "NotSaved"
    assert "full-sweeps" in output and "Traceback" not in output
    control_plane.full_volume("full-sweeps", full=False)
    driver.run(driver.command(sweep, *options))
    assert driver.ends(sweep)[0]["status"] == "completed"


@pytest.mark.slow
def test_the_control_plane_is_down_for_20_seconds(
    tmp_path: Path, held: Path, control_plane: LocalModal, undisturbed: list[float]
) -> None:
    sweep = tmp_path / "sweep"
    options = ["+name=down0,down1", "+pause=0.2", f"+hold={held}"]
    for name in ("down0", "down1"):
        (held / name).write_text("10")
    process = driver.start(driver.command(sweep, *options, steps=16))
    driver.wait_for_steps(control_plane, sweep, jobs=2, steps=2)
    control_plane.down(20)
    for name in ("down0", "down1"):
        (held / name).unlink()
    output = driver.finish(process)
    assert "2 of 2 jobs completed" in output
    assert [end["value"]["json"] for end in driver.ends(sweep).values()] == [undisturbed[-1]] * 2
    executed = driver.steps_by_call({"down0", "down1"}, control_plane)
    assert all(list(calls.values()) == [list(range(16))] for calls in executed.values())


@pytest.mark.slow
def test_a_job_longer_than_an_attempt_continues(tmp_path: Path, undisturbed: list[float]) -> None:
    """R30: as one whose machine is taken away after 24 hours."""
    sweep = tmp_path / "sweep"
    options = ["+name=long", "+pause=1.2", "hydra.launcher.timeout=16"]
    driver.run(driver.command(sweep, *options, "hydra.launcher.single_use=true", steps=16))
    [end] = driver.ends(sweep).values()
    assert end["attempt"] >= 2
    assert end["value"]["json"] == undisturbed[-1]
