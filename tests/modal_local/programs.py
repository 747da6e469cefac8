"""Small programs that use the real client, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .client import LocalModal

TIMEOUT = 300
# Called with the definitions that containers import too, the main part, and arguments.
Program = Callable[..., Any]


def environment(server: LocalModal) -> dict[str, str]:
    """Return the environment of a program that uses a control plane."""
    return {**os.environ, **server.env, "PYTHONPATH": ""}


def program_command(folder: Path, app: str, main: str, *arguments: str) -> list[str]:
    """Write a program and return the command that runs it."""
    path = folder / "program.py"
    body = textwrap.indent(textwrap.dedent(main), "    ")
    path.write_text(f'{textwrap.dedent(app)}\nif __name__ == "__main__":\n{body}\n')
    return [sys.executable, str(path), *arguments]


def run_command(server: LocalModal, command: list[str], cwd: Path) -> str:
    """Run a command that must succeed, and return its standard output."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(server),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
