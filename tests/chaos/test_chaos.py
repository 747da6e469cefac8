"""A few of the random faults of `chaos.py`; all of them are `python tests/chaos/chaos.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_law_holds() -> None:
    """The process that forks the commands is one of its own."""
    script = str(Path(__file__).with_name("chaos.py"))
    command = [sys.executable, script, "--faults", "20", "--seed", "1", "--sweeps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])["counts"]
    assert sum(counts.values()) == 20
