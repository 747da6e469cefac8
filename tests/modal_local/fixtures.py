"""Fixtures: one control plane, and programs against it.

A test module says `pytest_plugins = ["modal_local.fixtures"]` and uses `needs_modal`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .client import LocalModal, start
from .programs import Program, environment, program_command, run_command


@pytest.fixture(scope="session")
def needs_modal() -> None:
    """Skip where the client is not installed."""
    pytest.importorskip("modal")


@pytest.fixture(scope="session")
def local_modal(needs_modal: None) -> Iterator[LocalModal]:
    """One control plane for all tests; what they do must need no procedure it lacks."""
    secrets = {"token": {"TOKEN": "t-1"}}
    with start(secrets=secrets, options={"heartbeat": 0.5, "max_idle": 2.0}) as server:
        yield server
        assert server.state()["unimplemented"] == {}


@pytest.fixture
def isolated_modal(local_modal: LocalModal) -> LocalModal:
    """Skip where containers cannot be isolated."""
    state = local_modal.state()
    if state["isolation"] == "plain":
        pytest.skip(f"no namespaces: {state['isolation_reason']}")
    return local_modal


@pytest.fixture
def run_program(local_modal: LocalModal, tmp_path: Path) -> Program:
    """Return a function that runs a program and returns the last line it prints, as JSON."""

    def run(app: str, main: str, *arguments: str) -> Any:
        command = program_command(tmp_path, app, main, *arguments)
        return json.loads(run_command(local_modal, command, tmp_path).splitlines()[-1])

    return run


@pytest.fixture
def start_program(local_modal: LocalModal, tmp_path: Path) -> Iterator[Program]:
    """Return a function that starts a program; what still runs at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def launch(app: str, main: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            program_command(tmp_path, app, main, *arguments),
            cwd=tmp_path,
            env=environment(local_modal),
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield launch
    for process in running:
        process.kill()
        process.communicate()
