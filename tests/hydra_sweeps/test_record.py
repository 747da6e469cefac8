"""What a sweep's folder says: how jobs ended, what a kill leaves, what a refusal takes away."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.utils import JobReturn, JobStatus

from hydra_sweeps import processes
from hydra_sweeps.errors import JobFailed, SweepError
from hydra_sweeps.record import Outcome, Run, Sweep, begin, locked, outcome, read, write

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, Outcome("completed", 2.0)),
        (np.float32(0.5), Outcome("completed", 0.5)),
        ((1, np.array(2.0)), Outcome("completed", [1.0, 2.0])),
        (NAN, Outcome("failed", None, "returned nan")),
        (-INFINITY, Outcome("failed", None, "returned -inf")),
        ([1.0, INFINITY], Outcome("failed", [1.0, None], "returned inf")),
        *((nothing, Outcome("completed")) for nothing in (None, "3.5", True, {"a": 1.0}, [])),
        ([1.0, "3.5"], Outcome("completed")),
    ],
)
def test_what_a_job_returned(value: Any, expected: Outcome) -> None:
    """Numbers count, of whatever library; one that is none is a failure."""
    assert outcome(JobReturn([], status=JobStatus.COMPLETED, _return_value=value)) == expected


def test_a_job_that_failed_has_no_value() -> None:
    for raised, why in ((JobFailed("why\nand more"), "why"), (1.0, "brought no result")):
        ended = outcome(JobReturn([], status=JobStatus.FAILED, _return_value=raised))
        assert (ended.status, ended.value) == ("failed", None) and why in str(ended.error)


def sweep(*runs: Run) -> Sweep:
    return Sweep("grid", "train", "command", "/", [], runs={run.name: run for run in runs})


def test_what_a_killed_process_left_is_planned(tmp_path: Path) -> None:
    """Also a run that the next command does not have; what had ended stays as it was."""
    runs = [Run(0, "done", ["x=1"]), Run(1, "killed", ["x=2"], seconds=3.0)]
    runs[0].end(Outcome("completed", 1.0))
    runs[1].begin()
    before = sweep(*runs)
    before.started = "then"
    write(tmp_path, before)
    again = begin(tmp_path, sweep())
    states = {name: (run.status, run.value, run.seconds) for name, run in again.runs.items()}
    assert states == {"done": ("completed", 1.0, None), "killed": ("planned", None, None)}
    assert again.started == "then"


@pytest.mark.parametrize("left", ["nothing", "a file", "a run"])
def test_a_refusal_leaves_what_jobs_have_left(tmp_path: Path, left: str) -> None:
    """A folder that was not there goes again, but not with something that a job has made."""
    folder, run = tmp_path / "new" / "sweep", Run(0, "one", [])
    if left == "a run":
        run.begin()

    def refused() -> None:
        with locked(folder):
            write(folder, sweep(run))
            if left == "a file":
                (folder / "weights").write_text("of hours")
            raise SweepError("refused")

    with pytest.raises(SweepError, match="refused"):
        refused()
    assert folder.exists() == (left != "nothing") == folder.parent.exists()
    assert left == "nothing" or read(folder) is not None


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A sweep runs there, and says that nothing refuses a second one."""
    with locked(tmp_path):
        write(tmp_path, sweep(Run(0, "one", [])))
    assert list(begin(tmp_path, sweep()).runs) == ["one"]
    assert "No locks available: nothing refuses a second process" in caplog.text
    processes.lock_or_wait(0, tmp_path)
