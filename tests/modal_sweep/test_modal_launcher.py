"""What the launcher refuses, what each job gets, what crosses the wire."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PLANTED
from modal_app import driver
from modal_local.client import LocalModal

from modal_sweep.client.volumes import read_if_there, upload, volume

pytestmark = pytest.mark.usefixtures("on_local_modal")


def plain(sweep: Path | str, *overrides: str) -> list[str]:
    script = str(driver.APP / "plain.py")
    return [script, "-m", "hydra/launcher=modal", f"hydra.sweep.dir={sweep}", *overrides]


def value_of(sweep: Path, job: int = 0) -> Any:
    return driver.ends(sweep)[job]["value"]["json"]


def refused(sweep: Path, *overrides: str) -> str:
    """What a refused launch prints; it has spawned nothing and shows no traceback."""
    printed = driver.run(plain(sweep, *overrides), expect=1)
    assert "Traceback" not in printed
    assert driver.events(sweep, "spawn") == []
    return printed


def test_each_job_gets_the_machine_of_its_own_configuration(
    tmp_path: Path, control_plane: LocalModal
) -> None:
    sweep = tmp_path / "sweep"
    driver.run(plain(sweep, "machine=small,one,eight,either", "hydra.launcher.max_usd=null"))
    assert [value_of(sweep, job)[2] for job in range(4)] == [None, "H100!:1", "H100:8", "H200:1"]
    functions = {event["call"]: None for event in driver.events(sweep, "spawn")}
    state = control_plane.state()
    machines = [state["functions"][state["calls"][call]["function"]] for call in functions]
    assert machines[2]["gpu"] == "H100:8"
    assert state["functions"][machines[3]["base"]]["gpu"] == ["H200:1", "H100:1"]
    assert [function["timeout"] for function in machines[:2]] == [86400, 7200]
    assert [function["single_use"] for function in machines] == [False, True, True, True]


@pytest.mark.usefixtures("cold_containers")
def test_a_small_job_needs_no_blob(tmp_path: Path, control_plane: LocalModal) -> None:
    before = control_plane.state()
    driver.run(plain(tmp_path / "small", "name=a,b,c"))
    after = control_plane.state()
    assert after["counters"]["blobs_created"] == before["counters"]["blobs_created"]
    driver.run(plain(tmp_path / "large", "size=100000"))
    assert (tmp_path / "large" / "0" / "large.bin").stat().st_size == 100_000
    assert after["unimplemented"] == {}


def test_the_image_installs_what_the_code_imports(
    tmp_path: Path, control_plane: LocalModal
) -> None:
    driver.run(plain(tmp_path / "sweep", "name=lint"))
    [spawn] = driver.events(tmp_path / "sweep", "spawn")
    function = control_plane.state()["calls"][spawn["call"]]["function"]
    missing = control_plane.lint().get(function, {}).get("missing_imports", {})
    assert set(missing) <= {"torch", "numpy"}  # of the apps here


def test_a_relative_sweep_directory_is_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    driver.run(plain("runs/relative", "hydra.job.chdir=true"))
    here = tmp_path / "runs" / "relative" / "0"
    assert (here / "here.txt").read_text() == str(here)


PACKAGED = """
import hydra
from .parts.shape import Kind, double

@hydra.main(version_base=None, config_path=None)
def main(cfg):
    return double(cfg.x) + Kind.ROUND.value

if __name__ == "__main__":
    main()
"""
SHAPE = """
import enum
class Kind(enum.Enum):
    ROUND = 1
def double(x):
    return 2 * x
"""


def test_a_package_that_is_run_with_m_is_one_in_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent with its name, which its own modules are imported by."""
    (tmp_path / "shapes" / "parts").mkdir(parents=True)
    (tmp_path / "shapes" / "app.py").write_text(PACKAGED)
    (tmp_path / "shapes" / "parts" / "shape.py").write_text(SHAPE)
    monkeypatch.chdir(tmp_path)
    driver.run(["-m", "shapes.app", *plain(tmp_path / "sweep", "+x=1,2")[1:]])
    assert [value_of(tmp_path / "sweep", job) for job in range(2)] == [3, 5]
    (tmp_path / "shapes" / "__init__.py").touch()
    script = tmp_path / "shapes" / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, '.')" + PACKAGED.replace("from .", "from shapes.")
    )
    command = [str(script), *plain(tmp_path / "script", "+x=1")[1:]]
    assert "'shapes'; the container has no module of this name" in driver.run(command, expect=1)
    driver.run([*command, "hydra.launcher.image.sources=[shapes]"])
    assert value_of(tmp_path / "script") == 3


def test_no_secret_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import modal

    sweep = tmp_path / "sweep"
    secrets = "+resources.secrets={planted: [PLANTED]}"
    driver.run(plain(sweep, secrets, "hydra.launcher.volume=secret-check"))
    assert value_of(sweep)[1] == len(PLANTED)
    for path in sweep.rglob("*"):
        assert not path.is_file() or PLANTED.encode() not in path.read_bytes()
    volume = modal.Volume.from_name("secret-check")
    for entry in volume.listdir("/", recursive=True):
        if entry.type.name == "FILE":
            assert PLANTED.encode() not in b"".join(volume.read_file(entry.path))
    monkeypatch.setenv("HF_TOKEN", "anything")
    printed = refused(tmp_path / "copy", "hydra.job.env_copy=[HF_TOKEN]")
    assert "modal secret create" in printed


def test_missing_secrets_are_named(tmp_path: Path) -> None:
    printed = refused(tmp_path / "a", "+resources.secrets={nowhere: [HF_TOKEN]}")
    assert "modal secret create nowhere HF_TOKEN=..." in printed
    printed = refused(tmp_path / "b", "+resources.secrets={planted: [OTHER]}")
    assert "modal secret create planted OTHER=..." in printed


def test_required_inputs(tmp_path: Path) -> None:
    """A missing one is refused with its remedy; one that lies here is uploaded."""
    local = tmp_path / "input.txt"
    entry = "volume: inputs, path: in/input.txt, remedy: python make.py"
    printed = refused(tmp_path / "a", f"+resources.requires=[{{{entry}}}]")
    assert "python make.py" in printed and "modal volume ls inputs" in printed
    local.write_text("from here")
    volumes = "+resources.volumes={/in: inputs}"
    requires = f"+resources.requires=[{{{entry}, local: '{local}'}}]"
    driver.run(plain(tmp_path / "b", requires, volumes, "read=[/in/in/input.txt]"))
    assert "READ from here" in driver.modal_sweep("logs", tmp_path / "b")


def test_a_result_is_of_its_inputs(tmp_path: Path) -> None:
    """The same command takes it, unless the record of what it needs has another content; what is
    gone, or beside the record, is no reason."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "run.json").write_text("first")
    entry = f"{{volume: remade, path: made, local: '{made}', record: run.json}}"
    command = plain(tmp_path / "sweep", f"+resources.requires=[{entry}]")

    def calls() -> int:
        return len(driver.events(tmp_path / "sweep", "spawn"))

    driver.run(command)
    (made / "other").write_text("more")
    upload(volume("remade"), made, "made")
    driver.run(command)
    assert calls() == 1
    (made / "run.json").write_text("second")
    upload(volume("remade"), made, "made")
    assert "remade:made/run.json has changed" in driver.run(command)
    assert calls() == 2
    driver.run(command)
    volume("remade").remove_file("made/run.json")
    driver.run(command)
    assert calls() == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=a,b", "+resources.unique=[/runs/same]"], "would both write /runs/same"),
        (["name=a,b", "hydra.sweep.subdir=same"], "would both write"),
        (["+resources.gpus=1"], "resources.gpus is not a setting of a job"),
        (["resources.gpu=H100:9"], "resources.gpu=H100:9 is not valid"),
        (["resources.gpu=X900"], "no price is known for gpu=X900"),
        (["+resources.timeout=100000"], "must be in 1..86400"),
        (["hydra.launcher.gpu=T4"], "hydra.launcher.gpu has no effect"),
        (["hydra.launcher.if_done=maybe"], "choose one of: skip, rerun, fail"),
        (["machine=eight,one", "hydra.launcher.max_parallel=1"], "2 kinds of machines"),
        (["machine=eight", "hydra.launcher.max_usd=10"], "hydra.launcher.max_usd=40"),
        (["+resources.image={python: '3.9'}"], "the launching Python is"),
        (["+resources.image={sources: [nothing]}"], "does not exist"),
        (["+resources.validate=json.nothing"], "does not name an importable function"),
        (["+resources.validate=json.dumps"], "not JSON serializable"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path / "sweep", *overrides)


def test_a_dry_run_spawns_nothing(tmp_path: Path, control_plane: LocalModal) -> None:
    before = set(control_plane.state()["calls"])
    printed = driver.run(
        plain(tmp_path / "sweep", "machine=one,eight", "hydra.launcher.dry_run=true")
    )
    assert "H100:8" in printed and "33.58" in printed and "nothing was spawned" in printed
    assert set(control_plane.state()["calls"]) == before
    searching = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "name=choice(a,b)"]
    for option in ("dry_run", "detach"):
        printed = refused(tmp_path / "o", *searching, f"hydra.launcher.{option}=true")
        assert f"hydra.launcher.{option}=true" in printed


def test_setup_makes_volumes_and_names_secrets(tmp_path: Path) -> None:
    import modal

    needs = ["+resources.volumes={/in: made-by-setup}", "+resources.secrets={nowhere: [KEY]}"]
    script = str(driver.APP / "plain.py")
    printed = driver.modal_sweep("setup", script, f"hydra.sweep.dir={tmp_path}", *needs, expect=1)
    assert "modal secret create nowhere KEY=..." in printed
    modal.Volume.from_name("made-by-setup").hydrate()
    driver.modal_sweep("setup", script, f"hydra.sweep.dir={tmp_path}", needs[0])


def test_without_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name)
    printed = refused(tmp_path / "sweep")
    assert "modal setup" in printed and "hydra/launcher=basic" in printed
    needs = "+resources.secrets={planted: [PLANTED]}"
    rehearsed = driver.run(plain(tmp_path / "dry", "hydra.launcher.dry_run=true", needs))
    assert rehearsed.count("modal setup") == 1 and "nothing was spawned" in rehearsed


def test_modal_is_imported_only_when_launching() -> None:
    code = (
        "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print('modal' in sys.modules)"
    )
    script = [str(driver.APP / "plain.py"), "hydra.run.dir=/tmp/unused", "hydra.output_subdir=null"]
    done = subprocess.run(
        [sys.executable, "-c", code, *script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("False")


def test_the_journal_survives_a_cut_off_line(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    driver.run(plain(sweep, "name=a"))
    path = sweep / "modal" / "jobs.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event":"spawn","identi')
    printed = driver.run(plain(sweep, "name=a,b"))
    assert "(done)" in printed and "(spawned)" in printed
    for line in path.read_text().splitlines():
        json.loads(line)


def test_an_uploaded_file_keeps_its_zeros(tmp_path: Path) -> None:
    """Modal's client sends blocks without their trailing zeros."""
    content = b"x" + bytes(9_000_000) + b"y" + bytes(7)
    (tmp_path / "zeros.bin").write_bytes(content)
    upload(volume("zeros"), tmp_path / "zeros.bin", "zeros.bin")
    assert read_if_there(volume("zeros"), "zeros.bin") == content
