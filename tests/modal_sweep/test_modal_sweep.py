"""modal-sweep: every command, on a sweep of real jobs."""

import shutil
import signal
from pathlib import Path

import pytest
from modal_app import driver
from modal_local.client import LocalModal

pytestmark = pytest.mark.usefixtures("on_local_modal")


def test_a_sweep_from_its_submission_to_its_end(
    tmp_path: Path, held: Path, control_plane: LocalModal
) -> None:
    sweep = tmp_path / "sweep"
    options = ["+name=whole0,whole1", "+pause=0.1", "hydra.launcher.detach=true", f"+hold={held}"]
    for name in ("whole0", "whole1"):
        (held / name).write_text("8")
    unique = "+resources.unique=['/runs/${name}']"
    printed = driver.run(driver.command(sweep, *options, unique, steps=30))
    assert f"modal-sweep attach {sweep}" in printed and f"modal-sweep cancel {sweep}" in printed
    driver.wait_for_steps(control_plane, sweep, jobs=2, steps=2)

    assert "2 jobs: 2 in flight" in driver.modal_sweep("list", tmp_path)
    assert "whole1" in driver.modal_sweep("status", sweep)
    assert "STEP whole0 1" in driver.modal_sweep("logs", sweep, 0)
    refused = driver.modal_sweep("clean", sweep, "--yes", expect=1)
    assert "jobs are running" in refused and "Traceback" not in refused

    assert "2 jobs cancelled" in driver.modal_sweep("cancel", sweep)
    driver.modal_sweep("attach", sweep, expect=1)
    assert {end["status"] for end in driver.ends(sweep).values()} == {"cancelled"}

    for name in ("whole0", "whole1"):
        (held / name).unlink()
    driver.modal_sweep("rerun", sweep, "--failed")
    assert {end["status"] for end in driver.ends(sweep).values()} == {"completed"}
    assert {end["generation"] for end in driver.ends(sweep).values()} == {1}
    steps = driver.steps_by_call({"whole0"}, control_plane)["whole0"]
    assert len(steps) == 2
    first, second = steps.values()
    # From what was committed when the job was cancelled, which may be nothing: it depends on the
    # machine. That a job continues from its last commit is test_modal_durable's.
    assert second[-1] == 29 and min(second) <= max(first) + 1

    (sweep / "0" / "weights.txt").unlink()
    driver.modal_sweep("pull", sweep, "--checkpoints", "--to", tmp_path / "checkpoints")
    assert (sweep / "0" / "weights.txt").exists()
    assert (tmp_path / "checkpoints" / "whole1" / "last.npz").exists()

    driver.modal_sweep("clean", sweep, "--yes")
    assert (sweep / "0" / "weights.txt").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("cold_containers")
def test_the_same_command_again_costs_nothing(tmp_path: Path, control_plane: LocalModal) -> None:
    sweep = tmp_path / "sweep"
    command = driver.command(sweep, "+name=again0,again1")
    driver.run(command)
    before = control_plane.state()["counters"]["containers_started"]
    printed = driver.run(command)
    assert printed.count("(done)") == 2
    assert len(driver.events(sweep, "spawn")) == 2
    assert control_plane.state()["counters"]["containers_started"] == before
    refused = driver.run([*command, "hydra.launcher.if_done=fail"], expect=1)
    assert "if_done=skip" in refused
    driver.run([*command, "hydra.launcher.if_done=rerun"])
    assert {end["generation"] for end in driver.ends(sweep).values()} == {1}
    assert len(list((sweep / "modal").glob("common-*.bin"))) == 1


@pytest.mark.slow
def test_other_code_is_another_job(tmp_path: Path, held: Path, control_plane: LocalModal) -> None:
    """A finished job of other code is run again; one in flight is not mixed with it."""
    sweep, app = tmp_path / "sweep", tmp_path / "app"
    app.mkdir()
    code = (driver.APP / "toy.py").read_text()
    (app / "toy.py").write_text(code)
    shutil.copy(driver.APP / "standing.py", app)
    (held / "code").write_text("1")
    command = driver.command(sweep, "+name=code", f"+hold={held}")
    command[0] = str(app / "toy.py")
    process = driver.start(command)
    driver.wait_for_steps(control_plane, sweep, jobs=1, steps=1)
    (app / "toy.py").write_text(code + "\n# another version\n")
    refused = driver.run(command, expect=1)
    assert f"modal-sweep cancel {sweep}" in refused and "Traceback" not in refused
    (held / "code").unlink()
    driver.finish(process)
    driver.run(command)
    assert len({plan["code"] for plan in driver.events(sweep, "plan")}) == 2
    assert len(driver.events(sweep, "spawn")) == 2


def test_what_is_not_there(tmp_path: Path) -> None:
    refused = driver.modal_sweep("status", tmp_path, expect=1)
    assert "is not a sweep on Modal" in refused and "Traceback" not in refused
    assert "no sweeps" in driver.modal_sweep("list", tmp_path)


def test_control_c_detaches(tmp_path: Path, held: Path, control_plane: LocalModal) -> None:
    sweep = tmp_path / "sweep"
    (held / "detached").write_text("7")
    options = ["+name=detached", "+pause=0.1", f"+hold={held}"]
    process = driver.start(driver.command(sweep, *options, steps=8))
    driver.wait_for_steps(control_plane, sweep, jobs=1, steps=1)
    process.send_signal(signal.SIGINT)
    printed = driver.finish(process, expect=130)
    assert f"modal-sweep attach {sweep}" in printed and f"modal-sweep cancel {sweep}" in printed
    assert "Traceback" not in printed
    (held / "detached").unlink()
    driver.modal_sweep("attach", sweep)
    assert driver.ends(sweep)[0]["status"] == "completed"
    assert len(driver.events(sweep, "spawn")) == 1
