"""A sweep lives in one place on Modal; from another one it is refused, and nothing is lost."""

import json
from pathlib import Path

import pytest
from modal_app import driver
from modal_local.client import LocalModal

from modal_sweep.client.volumes import volume

pytestmark = pytest.mark.usefixtures("on_local_modal")


def values(sweep: Path, *overrides: str) -> list[str]:
    """The sweep of tests/modal_app/values.py."""
    flags = ["-m", "hydra/launcher=modal", f"hydra.sweep.dir={sweep}", "hydra.launcher.poll=0.2"]
    return [str(driver.APP / "values.py"), *flags, *overrides]


def test_another_place_is_refused_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that are too large for the result lie on a Volume of one environment."""
    sweep = tmp_path / "sweep"
    command = values(sweep, "x=1,2", "size=300000")
    monkeypatch.setenv("MODAL_ENVIRONMENT", "dev")
    driver.run([*command, "hydra.launcher.detach=true"])
    [line] = driver.events(sweep, "sweep")
    assert [line[key] for key in ("environment", "workspace", "app")] == ["dev", "local", "hydra"]
    monkeypatch.delenv("MODAL_ENVIRONMENT")
    for name in ("attach", "status", "pull", "logs", "cancel", "clean"):
        printed = driver.modal_sweep(name, sweep, *(["--yes"] * (name == "clean")), expect=1)
        assert "environment dev, and this is environment main" in printed
        assert "MODAL_ENVIRONMENT=dev" in printed and "Traceback" not in printed
    printed = driver.run(command, expect=1)
    assert "environment dev" in printed and "hydra.sweep.dir" in printed
    rehearsed = driver.run([*command, "hydra.launcher.dry_run=true"])
    assert "would be refused" in rehearsed and "environment dev" in rehearsed
    assert driver.ends(sweep) == {}
    monkeypatch.setenv("MODAL_ENVIRONMENT", "dev")
    driver.modal_sweep("attach", sweep)
    assert [end["status"] for end in driver.ends(sweep).values()] == ["completed"] * 2
    assert (sweep / "1" / "large.bin").stat().st_size == 300_000
    printed = driver.run([*command, "hydra.launcher.app=other"], expect=1)
    assert "app hydra, and this is app other" in printed and "Traceback" not in printed
    assert driver.run(command).count("(done)") == 2 and len(driver.events(sweep, "spawn")) == 2


def test_a_journal_that_does_not_say_where_goes_on(tmp_path: Path) -> None:
    """So did earlier versions, which also took outputs that stay for a failure."""
    sweep = tmp_path / "sweep"
    driver.run(values(sweep, "x=3", "size=300000"))
    path = sweep / "modal" / "jobs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for name in ("environment", "workspace", "app") if line["event"] == "sweep" else ():
            line.pop(name)
        if line["event"] == "end":
            line |= {"status": "failed", "error": {"type": "NotPulled", "message": "gone"}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    driver.modal_sweep("attach", sweep)
    assert driver.ends(sweep)[0]["status"] == "completed"
    assert len(driver.events(sweep, "spawn")) == 1


def test_outputs_that_cannot_be_brought_are_no_failure(
    tmp_path: Path, control_plane: LocalModal
) -> None:
    """A file in the way of a folder: said at once, completed, brought when it is gone."""
    sweep = tmp_path / "sweep"
    command = values(sweep, "x=4", "size=300000")
    (sweep / "0").parent.mkdir(parents=True)
    (sweep / "0").write_text("in the way")
    printed = driver.run(command)
    assert "1 of 1 jobs completed" in printed and "Traceback" not in printed
    assert "does not answer" not in printed
    assert f"modal-sweep pull {sweep}" in printed
    end = driver.ends(sweep)[0]
    assert end["status"] == "completed" and "sweep/0" in end["unpulled"]
    assert "outputs not here" in driver.modal_sweep("status", sweep, expect=1)
    (sweep / "0").unlink()
    assert "(done)" in driver.run(command)
    assert driver.ends(sweep)[0]["unpulled"] is None
    assert (sweep / "0" / "large.bin").stat().st_size == 300_000
    assert len(driver.events(sweep, "spawn")) == 1


def test_outputs_that_are_gone_from_the_volume_are_no_failure(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    driver.run(values(sweep, "x=5", "size=300000", "hydra.launcher.detach=true"))
    driver.modal_sweep("attach", sweep)
    path = sweep / "modal" / "jobs.jsonl"
    [line] = driver.events(sweep, "sweep")
    [spawn] = driver.events(sweep, "spawn")
    lines = [text for text in path.read_text().splitlines() if '"event":"end"' not in text]
    path.write_text("\n".join([*lines, ""]))
    (sweep / "0" / "large.bin").unlink()
    folder = f"{line['id']}/{spawn['identity']}.0/outputs"
    volume(line["volume"]).remove_file(folder, recursive=True)
    printed = driver.modal_sweep("attach", sweep, expect=1)
    assert "1 of 1 jobs completed" in printed and "are not here" in printed
    assert driver.ends(sweep)[0]["status"] == "completed"
    driver.modal_sweep("attach", sweep, expect=1)
    assert len(driver.events(sweep, "spawn")) == 1
