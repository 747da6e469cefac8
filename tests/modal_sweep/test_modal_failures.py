"""What Modal or this machine refuses is one line: what helps, what was spawned, what goes on."""

import errno
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modal_app import driver
from modal_local.client import LocalModal
from test_modal_place import values

from modal_sweep.client.calls import call_error
from modal_sweep.client.failures import refusal
from modal_sweep.client.image import image_spec
from modal_sweep.config import ImageSettings
from modal_sweep.errors import LaunchError, Raised, Unreachable
from modal_sweep.protocol.outage import AWAY, Outage, away, patiently

LOCAL = {errno.ENAMETOOLONG, errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT}


@settings(deadline=None)
@given(st.sampled_from(sorted(errno.errorcode)))
def test_only_what_is_about_a_connection_is_waited_out(number: int) -> None:
    """Too long a name or a full disk was taken for an outage of 15 minutes."""
    error = OSError(number, "text")
    assert away(error) == (number in AWAY or isinstance(error, ConnectionError | TimeoutError))
    assert not (away(error) and number in LOCAL)
    if not isinstance(error, TimeoutError):
        assert isinstance(call_error(error), Unreachable if away(error) else Raised)


def test_other_exceptions() -> None:
    from modal import exception

    assert away(socket.gaierror(-3, "no name server")) and away(exception.ServiceError("busy"))
    assert not away(ValueError()) and not away(FileNotFoundError("on a Volume"))

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/x")

    with pytest.raises(OSError, match="No space"):
        patiently(full, Outage(900.0))
    text = refusal(OSError(errno.ENOSPC, "No space left on device", "/x"))
    assert text.startswith("this machine refuses: [Errno 28] No space left on device: '/x'")
    assert "\n" not in text and "the same command continues" in text


@pytest.mark.usefixtures("on_local_modal")
def test_a_long_name_is_refused_before_anything_is_spawned(tmp_path: Path) -> None:
    """It was paid for 11 times."""
    options = ["hydra.sweep.subdir=${x}", f"x={'abcdefghij' * 30},b"]
    for extra in ([], ["hydra.launcher.dry_run=true"]):
        printed = driver.run(values(tmp_path / "sweep", *options, *extra), expect=1)
        assert "300 bytes" in printed and "hydra.sweep.subdir=" in printed
        assert "Traceback" not in printed
    assert driver.events(tmp_path / "sweep", "spawn") == []


def test_what_a_container_cannot_write_is_tried_once(
    tmp_path: Path, on_local_modal: LocalModal, control_plane: LocalModal
) -> None:
    sweep = tmp_path / "sweep"
    name = "+resources.progress_file=/tmp/" + "abcdefghij" * 30
    printed = driver.run(values(sweep, name), expect=1)
    assert "File name too long" in printed and "does not answer" not in printed
    [spawn] = driver.events(sweep, "spawn")
    assert control_plane.state()["calls"][spawn["call"]]["starts"] == [1]


def test_an_image_that_cannot_be_built(
    tmp_path: Path, on_local_modal: LocalModal, control_plane: LocalModal
) -> None:
    sweep = tmp_path / "sweep"
    bad = "hydra.launcher.image.packages=[broken-package-xyz]"
    command = values(sweep, "hydra/sweeper=experiment", "x=1,2")
    control_plane.break_build("broken-package-xyz")
    printed = driver.run([*command, bad], expect=1)
    assert "the image cannot be built, so nothing was spawned" in printed
    assert "modal image logs im-" in printed and "the same command continues" in printed
    assert "Traceback" not in printed and "failed" not in printed.replace("im-", "").split("(`")[1]
    assert '"failed"' not in (sweep / "sweep.json").read_text()
    assert driver.events(sweep, "spawn") == []
    control_plane.break_build("")
    driver.run([*command, bad])
    assert len(driver.events(sweep, "spawn")) == 2


def test_a_token_that_is_refused_while_waiting(
    tmp_path: Path, held: Path, on_local_modal: LocalModal, control_plane: LocalModal
) -> None:
    sweep = tmp_path / "sweep"
    (held / "job").touch()
    process = driver.start(values(sweep, "x=6", f"hold={held}/job"))
    control_plane.wait_for(lambda state: driver.running(control_plane, sweep))
    control_plane.fail("FunctionGetOutputs", count=1, status="UNAUTHENTICATED")
    printed = driver.finish(process, expect=1)
    [line] = [line for line in printed.splitlines() if "refuses the token" in line]
    assert "1 jobs in flight go on and are paid for" in line and "modal setup" in line
    assert f"modal-sweep attach {sweep}" in line and "Traceback" not in printed
    (held / "job").unlink()
    driver.modal_sweep("attach", sweep)
    assert len(driver.events(sweep, "spawn")) == 1


@pytest.mark.usefixtures("on_local_modal")
def test_everything_that_is_missing_is_named_in_its_order(tmp_path: Path) -> None:
    """What makes a missing thing may need something that is missing too."""
    first = "{volume: lacking, path: a, remedy: python a.py}"
    second = f"{{volume: lacking, path: b, remedy: python b.py, requires: [{first}]}}"
    third = f"{{volume: lacking, path: c, remedy: python c.py, requires: [{first}, {second}]}}"
    needs = f"+resources.requires=[{third}]"
    secret = "+resources.secrets={nowhere: [KEY]}"
    printed = driver.run(values(tmp_path / "sweep", needs, secret), expect=1)
    words = ["modal secret create nowhere", "python a.py", "python b.py", "python c.py"]
    places = [printed.index(word) for word in words]
    assert places == sorted(places) and printed.count("modal volume ls lacking") == 1
    local = third.replace("path: c", f"path: c, local: '{tmp_path}'")
    rehearsed = driver.run(
        values(tmp_path / "dry", f"+resources.requires=[{local}]", "hydra.launcher.dry_run=true")
    )
    assert "would upload" in rehearsed and "python a.py" not in rehearsed


def test_the_image_takes_the_tested_versions(tmp_path: Path) -> None:
    """Without those that come from here, or that are asked for otherwise."""
    (tmp_path / "constraints.txt").write_text(
        "# tested\nnumpy==2.4.6\nHydra_Core==1.0\ntorch==2.13.0  # CPU\nrich==14.0\n\n"
    )
    settings = ImageSettings(packages=["numpy", "torch<2"], constraints="constraints.txt")
    spec = image_spec(settings, tmp_path)
    assert spec["constraints"] == ["numpy==2.4.6", "rich==14.0"]
    assert "constraints" not in image_spec(ImageSettings(), tmp_path)
    with pytest.raises(LaunchError, match=r"image.constraints: .*nothing.txt cannot be read"):
        image_spec(ImageSettings(constraints="nothing.txt"), tmp_path)


def test_the_app_changes_with_the_tested_versions(
    tmp_path: Path, on_local_modal: LocalModal, control_plane: LocalModal
) -> None:
    folder = tmp_path / "app"
    (folder / "conf").mkdir(parents=True)
    for name in ("values.py", "conf/values.yaml"):
        (folder / name).write_text((driver.APP / name).read_text())
    apps = []
    for version in ("14.0", "14.1"):
        (folder / "constraints.txt").write_text(f"rich=={version}\n")
        command = values(tmp_path / version, "hydra.launcher.image.constraints=constraints.txt")
        command[0] = str(folder / "values.py")
        printed = driver.run([*command, "hydra.launcher.dry_run=true"])
        assert "in the versions of 1 constraints" in printed
        driver.run(command)
        [plan] = driver.events(tmp_path / version, "plan")
        apps.append(plan["app"])
    assert apps[0] != apps[1]
