"""hydra/sweeper=experiment on small jobs of every kind, in processes of their own."""

import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from hydra.core.singleton import Singleton
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite
from hydra.version import VersionBase

from tests.sweep_app.here import (
    ENVIRONMENT,
    content,
    refused,
    runs,
    start,
    started,
    sweep,
    wait_for,
)


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own() -> None:
    """The suite counts on the defaults of Hydra's version base, which other tests have set."""
    Singleton._instances.pop(VersionBase, None)


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("basic", ["hydra/sweeper=experiment", "hydra.sweeper.max_batch_size=2"]),
     ("basic", ["hydra/sweeper=experiment", "hydra.sweeper.max_batch_size=2",
                "hydra.sweeper.n_jobs=2"])],
    ids=["one by one", "processes"],
)  # fmt: skip
class TestHydrasOwnSuite(BatchedSweeperTestSuite):
    pass


def python(code: str) -> str:
    """What some code prints, in a folder where nothing of ours lies."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_discovery() -> None:
    code = """
import sys
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
print([plugin.__name__ for plugin in Plugins.instance().discover(Sweeper)])
print([name for name in ("optuna", "modal", "torch", "rich") if name in sys.modules])
"""
    plugins, heavy = python(code).splitlines()
    assert "'ExperimentSweeper'" in plugins and heavy == "[]"


@pytest.mark.timing
@pytest.mark.parametrize(
    ("options", "front"), [("grid.config", "sweeper"), ("study.config", "optuna_async")]
)
def test_it_adds_little_to_the_start_of_any_hydra_app(options: str, front: str) -> None:
    code = f"""
import importlib, time
import hydra._internal.core_plugins.basic_sweeper, hydra.plugins.search_path_plugin
start = time.process_time()
importlib.import_module("hydra_sweeps.{options}")
importlib.import_module("hydra_plugins.experiment_sweeper.{front}")
print(time.process_time() - start)
"""
    seconds = [float(python(code)) for _ in range(5)]
    assert statistics.median(seconds) < 0.02, seconds


def test_jobs_of_every_kind(tmp_path: Path) -> None:
    """Those that fail fail alone; on a second start only they run again."""
    kinds = "kind=value,raises,notanumber,exits,nothing,pair"
    printed, errors = sweep(tmp_path, kinds, "x=1,2", code=1)
    assert "6 of 12 runs failed" in errors
    assert "and says more" in errors and "Traceback" in errors  # why the job raised
    records = {
        name: (run["status"], run["value"], run["error"]) for name, run in runs(tmp_path).items()
    }
    assert records["value_x2"] == ("completed", 2.0, None)
    assert records["pair_x1"] == ("completed", [1.0, 2.0], None)
    assert records["nothing_x1"] == ("completed", None, None)
    assert records["raises_x1"] == ("failed", None, "ValueError: a job that raises")
    assert records["notanumber_x1"] == ("failed", None, "returned nan")
    assert records["exits_x2"] == ("failed", None, "the job called sys.exit(3)")
    assert content(tmp_path)["state"] == "complete"
    assert (tmp_path / "sweep" / "multirun.yaml").exists()
    lines = printed[printed.index("rank") :].splitlines()
    assert lines[0].split() == ["rank", "run", "overrides", "score", "status", "time"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["1", "value_x2"], ["2", "pair_x2"], ["3", "value_x1"], ["4", "pair_x1"]
    ]  # fmt: skip
    assert "#2 raises_x1 failed: ValueError: a job that raises" in lines

    printed, errors = sweep(tmp_path, kinds, "x=1,2", code=1)
    assert f"#1 : folder={tmp_path} kind=value x=2 (done: 2)" in printed
    assert started(tmp_path)[12:] == [
        "raises_x1", "raises_x2", "notanumber_x1", "notanumber_x2", "exits_x1", "exits_x2"
    ]  # fmt: skip
    assert "6 of 12 runs failed" in errors


def test_what_is_finished(tmp_path: Path) -> None:
    """The same configuration, but for what is ignored, inputs, and what hydra.sweeper.exists
    names."""
    evidence = "hydra.sweeper.exists=${folder}/${name}.txt"
    inputs = "hydra.sweeper.inputs=['${folder}/${kind.name}.data']"

    def again(*overrides: str) -> list[str]:
        before = len(started(tmp_path))
        sweep(tmp_path, "x=1,2", evidence, inputs, *overrides)
        return started(tmp_path)[before:]

    assert again() == ["value_x1", "value_x2"]
    assert again() == []
    (tmp_path / "value.data").write_text("made again")
    assert again("note=other") == ["value_x1", "value_x2"]
    assert again() == []
    assert again("y.depth=2") == ["value_x1", "value_x2"]
    assert again("y.depth=2", "x=3") == ["value_x3"]
    (tmp_path / "value_x1.txt").unlink()
    assert again("y.depth=2") == ["value_x1"]
    # Under another name a value is another one: nothing is done, and none may stand beside it.
    loss = "hydra.sweeper.names=[loss]"
    _, errors = sweep(tmp_path, "x=1,2", loss, code=1)
    assert "value_x3 of this sweep has returned score, and the runs of this" in errors
    (other := tmp_path / "other").mkdir()
    sweep(other, "x=1")
    sweep(other, "x=1", loss)
    assert started(other) == ["value_x1"] * 2
    assert again("y.depth=2", "hydra.sweeper.if_done=rerun") == ["value_x1", "value_x2"]
    assert sorted(runs(tmp_path)) == ["value_x1", "value_x2", "value_x3"]


def test_a_run_alone(tmp_path: Path) -> None:
    """Its command reproduces it; what was asked of it is kept."""
    sweep(tmp_path, "y.depth=1,2", "hydra.sweeper.repeats=2")
    records = runs(tmp_path)
    names = ["value_x1.0_depth1", "value_x1.0_depth1_seed1", "value_x1.0_depth2",
             "value_x1.0_depth2_seed1"]  # fmt: skip
    assert list(records) == names
    assert records[names[3]]["record"] == {"x": 1.0, "file": f"{tmp_path}/{names[3]}.txt"}
    before = started(tmp_path)
    command = shlex.split(records[names[3]]["command"])
    assert command[0] == "python" and "-m" not in command
    alone = warm.run([*command[1:], f"hydra.run.dir={tmp_path}/alone"], tmp_path, ENVIRONMENT)
    assert alone.returncode == 0, alone.stderr
    assert started(tmp_path) == [*before, names[3]]
    assert (tmp_path / f"{names[3]}.txt").read_text() == "1"


def test_batches_that_fail(tmp_path: Path) -> None:
    """A launcher that breaks loses one batch; one that refuses has refused everything."""
    breaking = ["hydra/launcher=breaking", "hydra.sweeper.max_batch_size=2"]
    printed, errors = sweep(tmp_path, *breaking, "kind=value,raises,pair", "x=1,2", code=1)
    assert printed.count("LAUNCH") == 3 and "2 of 6 runs failed" in errors
    records = runs(tmp_path)
    assert records["raises_x2"]["error"] == "RuntimeError: a launcher that breaks"
    assert records["pair_x2"]["status"] == "completed"
    assert records["pair_x2"]["command"].endswith(
        f"app.py -m folder={tmp_path} kind=pair x=2 hydra/launcher=breaking"
    )
    printed, _ = sweep(tmp_path, *breaking, "kind=value,raises,pair", "x=1,2,3", code=1)
    # What is left goes together, where folders do not depend on job numbers.
    assert [line for line in printed.splitlines() if line.startswith("LAUNCH")] == [
        "LAUNCH 2 2", "LAUNCH 4 2", "LAUNCH 8 1"
    ]  # fmt: skip
    _, errors = sweep(tmp_path, *breaking, "kind=dies,value", code=1)
    assert "a launcher that refuses" in errors and "Traceback" not in errors
    assert runs(tmp_path)["dies_x1.0"]["status"] == "planned"
    assert content(tmp_path)["state"] == "interrupted"


def test_jobs_that_go_on_elsewhere(tmp_path: Path) -> None:
    """A launcher that leaves its jobs running ends the process; nobody says that they ended."""
    sweep(tmp_path, "hydra/launcher=breaking", "kind=waits", "x=1,2")
    assert {run["status"] for run in runs(tmp_path).values()} == {"running"}
    assert content(tmp_path)["state"] == "running"


def test_folders_by_job_number(tmp_path: Path) -> None:
    """A job keeps its number, and so its folder, beside jobs that are done."""
    numbered = ["hydra/launcher=breaking", "hydra.sweep.subdir=${hydra:job.num}"]
    sweep(tmp_path, *numbered, "hydra.sweeper.name_key=null", "x=1,2,3,4")
    command = [*numbered, "hydra.sweeper.name_key=null", "x=5,2,6,7"]
    printed, _ = sweep(tmp_path, *command)
    assert [line for line in printed.splitlines() if line.startswith("LAUNCH")] == [
        "LAUNCH 0 1", "LAUNCH 2 2"
    ]  # fmt: skip
    written = (tmp_path / "sweep" / "3" / ".hydra" / "overrides.yaml").read_text()
    assert "x=7" in written
    assert {name: run["value"] for name, run in runs(tmp_path).items()} == {
        "0": 5, "1": 2, "2": 6, "3": 7
    }  # fmt: skip


def test_a_launcher_that_remembers_is_asked_again(tmp_path: Path) -> None:
    for _ in range(2):
        sweep(tmp_path, "hydra/launcher=remembering", "x=1,2")
    assert len(started(tmp_path)) == 4
    assert [run["value"] for run in runs(tmp_path).values()] == [1.0, 2.0]


def test_processes(tmp_path: Path) -> None:
    """A job that takes its process with it fails alone."""
    kinds = "kind=value,dies,raises,notanumber"
    _, errors = sweep(tmp_path, "hydra.sweeper.n_jobs=2", kinds, "x=1,2", code=1)
    assert "6 of 8 runs failed" in errors
    records = runs(tmp_path)
    assert "exit code 9" in records["dies_x1"]["error"]
    assert records["raises_x1"]["error"] == "ValueError: a job that raises"
    assert records["value_x2"]["value"] == 2.0
    sweep(tmp_path, "hydra.sweeper.n_jobs=2", "kind=value", "x=1,2")
    assert started(tmp_path).count("value_x1") == 1


@pytest.mark.parametrize(
    ("number", "n_jobs"),
    [
        (signal.SIGINT, "null"),
        (signal.SIGTERM, "2"),
        pytest.param(signal.SIGINT, "2", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "null", marks=pytest.mark.slow),
    ],
)
def test_interrupted(tmp_path: Path, number: signal.Signals, n_jobs: str) -> None:
    """The state is said, what is done stays, the same command continues."""
    command = ["kind=value,waits", "x=1,2", f"hydra.sweeper.n_jobs={n_jobs}"]
    process = start(tmp_path, *command)
    wait_for(lambda: "waits_x1" in started(tmp_path), process)
    done = {"value_x1", "value_x2"}
    wait_for(
        lambda: {n for n, r in runs(tmp_path).items() if r["status"] == "completed"} == done,
        process,
    )
    assert content(tmp_path)["state"] == "running"
    process.send_signal(number)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, printed + errors
    assert "the same command continues" in errors and "Traceback" not in errors
    assert "rank" in printed and "planned" in printed
    assert content(tmp_path)["state"] == "interrupted"
    states = [run["status"] for run in runs(tmp_path).values()]
    assert states == ["completed", "completed", "planned", "planned"]
    (tmp_path / "go").touch()
    sweep(tmp_path, *command)
    assert started(tmp_path).count("value_x1") == 1
    assert {run["status"] for run in runs(tmp_path).values()} == {"completed"}


def test_killed(tmp_path: Path) -> None:
    command = ["kind=value,waits", "x=1,2"]
    process = start(tmp_path, *command)
    wait_for(lambda: "waits_x1" in started(tmp_path), process)
    process.kill()
    process.communicate()
    assert [run["status"] for run in runs(tmp_path).values()] == [
        "completed", "completed", "running", "planned"
    ]  # fmt: skip
    (tmp_path / "go").touch()
    printed, _ = sweep(tmp_path, *command)
    assert printed.count("(done: ") == 2
    assert started(tmp_path) == ["value_x1", "value_x2", "waits_x1", "waits_x1", "waits_x2"]
    assert content(tmp_path)["state"] == "complete"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = start(tmp_path, "kind=waits")
    wait_for(lambda: bool(started(tmp_path)), first)
    _, errors = sweep(tmp_path, "kind=value", code=1)
    assert f"another process (pid {first.pid}) runs the sweep" in errors
    assert "Traceback" not in errors
    printed, _ = sweep(tmp_path, "kind=waits", "hydra.sweeper.dry_run=true")
    assert printed.splitlines()[-1] == "1 runs"
    (tmp_path / "go").touch()
    first.communicate(timeout=300)
    assert first.returncode == 0 and list(runs(tmp_path)) == ["waits_x1.0"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    printed, _ = sweep(tmp_path, "x=1,2", "hydra.sweeper.dry_run=true")
    assert printed.splitlines()[-1] == "2 runs"
    assert f"#1   folder={tmp_path} x=2  value_x2  {tmp_path}/sweep/value_x2" in printed
    assert list(tmp_path.iterdir()) == []
    sweep(tmp_path, "x=2")
    printed, _ = sweep(tmp_path, "x=1,2", "hydra.sweeper.dry_run=true")
    assert f"{tmp_path}/sweep/value_x2  (done: 2)" in printed


def test_some_runs_by_name(tmp_path: Path) -> None:
    """By patterns of their names; the others of the same sweep stay to be done."""
    only = "hydra.sweeper.only=[*_x2,*_x4]"
    printed, _ = sweep(tmp_path, "x=1,2,3,4", only, "hydra.sweeper.dry_run=true")
    assert printed.splitlines()[-1] == "2 runs"
    sweep(tmp_path, "x=1,2,3,4", only)
    assert sorted(runs(tmp_path)) == ["value_x2", "value_x4"]
    printed, _ = sweep(tmp_path, "x=1,2,3,4", "hydra.sweeper.dry_run=true")
    assert printed.count("(done: ") == 2
    _, errors = sweep(tmp_path, "x=1,2", "hydra.sweeper.only=[nothing]", code=1)
    assert "no run fits hydra.sweeper.only=['nothing']; there are: value_x1, value_x2" in errors


def test_the_report(tmp_path: Path) -> None:
    """Called at the end of every sweep; its failure is not the sweep's."""
    own = "hydra.sweeper.report=__main__.reported"
    assert "REPORTED sweep" in sweep(tmp_path, own)[0]
    assert "REPORTED sweep" in sweep(tmp_path, own, "kind=raises", code=1)[0]
    for wrong in (["note='no report'", own], ["hydra.sweeper.report=no.where"]):
        printed, errors = sweep(tmp_path, *wrong)
        assert "no report: " in printed + errors


def test_the_smallest_is_best(tmp_path: Path) -> None:
    direction = ["hydra.sweeper.direction=[minimize,maximize]", "hydra.sweeper.names=[a,b]"]
    printed, _ = sweep(tmp_path, *direction, "kind=pair", "x=2,1,3")
    lines = printed[printed.index("rank") :].splitlines()
    assert lines[0].split()[3:5] == ["a", "b"]
    assert [line.split()[3:5] for line in lines[1:]] == [["1", "2"], ["2", "2"], ["3", "2"]]
    assert content(tmp_path)["objectives"] == [
        {"name": "a", "direction": "minimize"}, {"name": "b", "direction": "maximize"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=glob(nothing/*)"], "kind=glob(nothing/*) matches nothing"),
        (["kind=glob(more/*)"], "'+kind/more=glob(*)' does"),
        (["x=interval(0,1)"], "hydra/sweeper=optuna_async"),
        (["hydra.sweeper.cases=['kind=value x=1','kind=nowhere']"], "kind/nowhere"),
        (["hydra.sweeper.cases=['x=1','kind']"], "hydra.sweeper.cases[1]='kind' cannot be read"),
        (["hydra.sweeper.cases=['']"], "hydra.sweeper.cases[0]='' is empty"),
        (["hydra.sweeper.cases=['hydra.verbose=true']"], "hydra.verbose=true concerns all runs"),
        (["hydra.sweeper.cases=['x=1']", "x=2,3"], "leave it in one place"),
        (["hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0 must be at least 1"),
        (["hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0"),
        (["hydra.sweeper.if_done=maybe"], "choose one of: skip, rerun"),
        (["hydra.sweeper.direction=up"], "maximize or minimize"),
        (["hydra.sweeper.direction=[maximize,minimize]"], "hydra.sweeper.names=['score']"),
        (["hydra.sweeper.repeats=2", "seed=1,2"], "seed is swept"),
        (["hydra.sweeper.repeats=2", "hydra.sweeper.repeat_key=y"], "not an integer"),
        (["hydra.sweeper.repeats=2", "hydra.sweeper.repeat_key=null"], "hydra.sweeper.repeat_key"),
        (["y.depth=1,2", "hydra.sweeper.name_key=null"], "folder of another run"),
        (["x=1,2", "hydra.sweep.subdir=same"], "would both write to"),
    ],
    ids=lambda message: message if isinstance(message, str) else None,
)
def test_what_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refused(tmp_path, *overrides)
    assert started(tmp_path) == []


def test_a_refusal_is_no_traceback(tmp_path: Path) -> None:
    """Processes are for Hydra's own launcher."""
    _, errors = sweep(tmp_path, "hydra.sweeper.n_jobs=2", "hydra/launcher=breaking", code=1)
    assert "is for hydra/launcher=basic" in errors and "Traceback" not in errors, errors
    assert started(tmp_path) == []


def test_a_record_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    for text in ("{", '{"version": 2, "runs": []}'):
        (tmp_path / "sweep" / "sweep.json").write_text(text)
        _, errors = sweep(tmp_path, code=1)
        assert "sweep.json cannot be read" in errors and "Traceback" not in errors
        assert (tmp_path / "sweep" / "sweep.json").read_text() == text
