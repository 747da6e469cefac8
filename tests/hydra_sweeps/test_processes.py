"""Jobs as processes: results, ways to end, progress files, locks, a controller that is gone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from hydra_sweeps.processes import Processes
from hydra_sweeps.runner import Batches, neighbours, open_runner
from tests.study_app import toy
from tests.study_app.here import journal, launcher_for, wait_for


@pytest.fixture(autouse=True)
def fresh_hydra(hydra_restore_singletons: Any) -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def drain(processes: Processes) -> dict[int, JobReturn]:
    """All ends."""
    done: dict[int, JobReturn] = {}
    deadline = time.monotonic() + 300
    while processes.jobs or processes.unmade:
        assert time.monotonic() < deadline
        done |= dict(processes.ended(1))
    return done


def test_basic_becomes_processes_and_others_batches(tmp_path: Path) -> None:
    launcher = launcher_for(tmp_path)
    assert isinstance(open_runner(launcher, True), Processes)

    class Other(BasicLauncher):
        pass

    assert isinstance(open_runner(Other(), True), Batches)


def test_jobs_run_beside_each_other_and_return(tmp_path: Path) -> None:
    processes = Processes(launcher_for(tmp_path), True)
    for number, x in enumerate((1, 2)):
        processes.start(number, [f"x={x}", "steps=1"])
    assert processes.ended(0) == []
    wait_for(lambda: len(journal(tmp_path)) == 2)  # both run before either may end
    (tmp_path / "go").touch()
    done = drain(processes)
    assert {number: returned.return_value for number, returned in done.items()} == {
        0: -4.25,
        1: -1.25,
    }
    assert done[1].overrides == ["x=2", "steps=1"] and done[1].cfg is not None
    assert done[1].hydra_cfg is not None and done[1].hydra_cfg.hydra.job.num == 1
    folder = Path(done[1].hydra_cfg.hydra.runtime.output_dir)
    assert folder == tmp_path / "toy_x2.0_a"
    assert (folder / ".hydra/config.yaml").exists()
    assert "job 1 prints \\udce4" in (folder / f"{done[1].task_name}.out").read_text()


@pytest.mark.parametrize(
    ("act", "message"),
    [("raise", "this job"), ("kill", "SIGKILL"), ("exit", "exit code 7 and no result")],
)
def test_a_job_that_ends_badly_is_one_failed_record(tmp_path: Path, act: str, message: str) -> None:
    processes = Processes(launcher_for(tmp_path), True)
    processes.start(0, ["x=1", f"act={act}"])
    processes.start(1, ["x=2"])
    done = drain(processes)
    assert done[0].status == JobStatus.FAILED and done[0].overrides == ["x=1", f"act={act}"]
    with pytest.raises(Exception, match=message):
        _ = done[0].return_value
    assert done[1].return_value == -1.25
    if act == "raise":
        assert "Traceback" in (tmp_path / f"toy_x1.0_a/{done[0].task_name}.out").read_text()


def test_what_cannot_be_composed_is_a_failed_end(tmp_path: Path) -> None:
    processes = Processes(launcher_for(tmp_path), True)
    processes.start(0, ["x=many"])
    done = drain(processes)
    with pytest.raises(Exception, match="could not be converted to Float"):
        _ = done[0].return_value


def of_its_own(cfg: DictConfig) -> Any:
    return (n for n in range(3))


class Strange(Exception):
    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)


def strange(cfg: DictConfig) -> Any:
    raise Strange(1, "strange text")


@pytest.mark.parametrize(
    ("task", "message"), [(of_its_own, "generator"), (strange, "strange text")]
)
def test_what_no_pipe_takes_is_said(tmp_path: Path, task: Any, message: str) -> None:
    processes = Processes(launcher_for(tmp_path, task=task), True)
    processes.start(0, [])
    with pytest.raises(Exception, match=message):
        _ = drain(processes)[0].return_value


def test_results_larger_than_a_pipe(tmp_path: Path) -> None:
    processes = Processes(launcher_for(tmp_path, task=lambda cfg: "x" * 3_000_000), True)
    processes.start(0, [])
    assert len(drain(processes)[0].return_value) == 3_000_000


def test_progress_is_reported_once(tmp_path: Path) -> None:
    processes = Processes(launcher_for(tmp_path), True)
    processes.start(0, ["x=2", "steps=2"])
    (tmp_path / "go-0").touch()
    lines: list[dict[str, Any]] = []
    wait_for(lambda: bool(lines.extend(processes.reports().get(0, [])) or lines))
    assert [line["step"] for line in lines] == [1] and lines[0]["eval/score"] == -0.625
    assert processes.reports() == {}
    (tmp_path / "go-1").touch()
    wait_for(lambda: bool(lines.extend(processes.reports().get(0, [])) or len(lines) == 2))
    drain(processes)


def test_stop_ends_one_job(tmp_path: Path) -> None:
    processes = Processes(launcher_for(tmp_path), True)
    processes.start(0, ["x=1", "steps=1"])
    processes.start(1, ["x=2", "steps=1"])
    wait_for(lambda: len(journal(tmp_path)) == 2)
    processes.stop(0)
    done = dict(processes.ended(300))
    with pytest.raises(Exception, match="SIGTERM"):
        _ = done[0].return_value
    assert list(processes.jobs) == [1]
    processes.close()
    assert processes.jobs == {}
    assert not any(line[0] == "end" for line in journal(tmp_path))
    processes.close()


def ignore_and_wait(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    toy.tell(Path(HydraConfig.get().sweep.dir), f"start {os.getpid()} {helper.pid}")
    time.sleep(600)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_close_kills_what_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_sweeps.processes.GRACE", 0.2)
    processes = Processes(launcher_for(tmp_path, task=ignore_and_wait), True)
    processes.start(0, [])
    wait_for(lambda: len(journal(tmp_path)) == 1)
    processes.close()
    pids = [int(pid) for pid in journal(tmp_path)[0][1:]]
    wait_for(lambda: not any(map(alive, pids)))


CONTROLLER = """
import sys, time
from pathlib import Path
from tests.study_app.here import launcher_for
from hydra_sweeps.processes import Processes
processes = Processes(launcher_for(Path(sys.argv[1])), True)
processes.start(0, ["x=1", "steps=2"])
while True:
    processes.ended(1)
"""


def test_a_job_ends_with_its_controller_and_its_successor_waits(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(tmp_path)], cwd=root, env=environment
    )
    wait_for(lambda: len(journal(tmp_path)) == 1)
    orphan = int(journal(tmp_path)[0][2])
    os.kill(orphan, signal.SIGSTOP)  # as one that takes long to save
    controller.kill()
    controller.wait()
    (tmp_path / "go").touch()
    processes = Processes(launcher_for(tmp_path), True)
    processes.start(0, ["x=1", "steps=2"])
    output = tmp_path / "toy_x1.0_a"
    wait_for(lambda: any("waiting until" in p.read_text() for p in output.glob("*.out")))
    assert len(journal(tmp_path)) == 1 and alive(orphan)
    os.kill(orphan, signal.SIGCONT)
    assert drain(processes)[0].return_value == -4.25
    wait_for(lambda: not alive(orphan))


def test_batches_keep_numbers_together() -> None:
    assert neighbours([0, 1, 4, 6, 7]) == [[0, 1], [4], [6, 7]]


def test_batches_launch_what_was_started(tmp_path: Path) -> None:
    batches = Batches(launcher_for(tmp_path))
    for number in (0, 1, 5):
        batches.start(number, [f"x={number}"])
    batches.stop(1)
    done = dict(batches.ended(0))
    assert {n: returned.return_value for n, returned in done.items()} == {0: -9.25, 5: -4.25}
    assert [line[1] for line in journal(tmp_path) if line[0] == "start"] == ["0", "5"]
    assert batches.ended(0) == [] and batches.reports() == {}


def test_a_launch_that_breaks_fails_its_jobs_alone(tmp_path: Path) -> None:
    class Breaks(BasicLauncher):
        def launch(self, job_overrides: Any, initial_job_idx: int) -> Any:
            if initial_job_idx == 0:
                raise OSError("a worker is gone")
            return [None for _ in job_overrides]

    batches = Batches(Breaks())
    for number in (0, 2):
        batches.start(number, [f"x={number}"])
    done = dict(batches.ended(0))
    for number, message in ((0, "a worker is gone"), (2, "returned nothing")):
        with pytest.raises(Exception, match=message):
            _ = done[number].return_value
