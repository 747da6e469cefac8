"""The GPU check, rehearsed without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "gpu_check.py"


def check(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_a_step_is_profiled(tmp_path: Path) -> None:
    """All parts take minutes: `python benchmarks/gpu_check.py --rehearse`."""
    out = tmp_path / "check.json"
    done = check(out, "--only", "eagle3 0.6B 1")
    [result] = json.loads(out.read_text()).values()
    assert done.returncode == 0, result
    [ours] = result["runs"]
    assert ours["profile"]["operators"] > 100 and len(ours["profile"]["largest"]) == 10


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    assert check(out, "--seconds", "0", "--only", "machine").returncode == 1
    assert json.loads(out.read_text()) == {"machine": {"failed": "no time was left"}}
