"""Start a control plane in a process of its own, and drive it. Standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 300.0
POLL_SECONDS = 0.05
State = dict[str, Any]


@dataclass
class LocalModal:
    """A running control plane."""

    env: dict[str, str]  # the variables that make clients find it
    admin: str  # base URL
    process: subprocess.Popen[bytes]

    def state(self) -> State:
        """Return the state as it is now."""
        return self.get("/admin/state")

    def lint(self) -> State:
        """Return the missing imports of every function."""
        return self.get("/admin/lint")

    def get(self, path: str) -> State:
        """Return a JSON answer."""
        with urllib.request.urlopen(self.admin + path, timeout=60) as answer:
            found: State = json.load(answer)
            return found

    def post(self, path: str, **query: object) -> None:
        """Ask for a fault."""
        if query:
            path += "?" + urllib.parse.urlencode(query)
        request = urllib.request.Request(self.admin + path, method="POST")
        with urllib.request.urlopen(request, timeout=60):
            pass

    def preempt(self, task: str) -> None:
        """Preempt a container."""
        self.post(f"/admin/preempt/{task}")

    def kill(self, task: str) -> None:
        """Kill a container, as when its machine is lost."""
        self.post(f"/admin/kill/{task}")

    def expire(self, call: str) -> None:
        """Drop the results of a call."""
        self.post(f"/admin/expire/{call}")

    def delay(self, rpc: str = "", seconds: float = 1.0, count: int = 1) -> None:
        """Delay the next answers of a procedure, or of any."""
        self.post("/admin/delay", rpc=rpc, seconds=seconds, count=count)

    def fail(self, rpc: str = "", count: int = 1, status: str = "UNAVAILABLE") -> None:
        """Refuse the next requests of a procedure, or of any."""
        self.post("/admin/fail", rpc=rpc, count=count, status=status)

    def down(self, seconds: float) -> None:
        """Drop all connections and refuse new ones for a while."""
        self.post("/admin/down", seconds=seconds)

    def full_volume(self, name: str, full: bool = True) -> None:
        """Make a volume refuse more data, or take it again."""
        self.post(f"/admin/full_volume/{name}", full=int(full))

    def break_build(self, text: str) -> None:
        """Let builds fail whose commands have this text in them; "": let all succeed."""
        self.post("/admin/break_build", text=text)

    def cold(self, cold: bool) -> None:
        """Start containers cold although there is a process that forks them, or fork them again."""
        self.post("/admin/cold", cold=int(cold))

    def wait_for(self, condition: Callable[[State], Any], timeout: float = 300.0) -> State:
        """Return the first state that fulfils a condition."""
        end = time.monotonic() + timeout
        while True:
            state = self.state()
            if condition(state):
                return state
            if time.monotonic() > end:
                raise TimeoutError(f"not within {timeout} s; state: {json.dumps(state)[:4000]}")
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Stop the control plane and its containers."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> LocalModal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def start(
    *,
    secrets: Mapping[str, Mapping[str, str]] | None = None,
    options: Mapping[str, object] | None = None,
    share: Sequence[str | Path] = (),
    env: Mapping[str, str] | None = None,
) -> LocalModal:
    """Start a control plane and wait until it serves; `env` is of every container."""
    package = Path(__file__).resolve().parent
    paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    arguments = [sys.executable, "-m", package.name]
    for name, values in (secrets or {}).items():
        for key, value in values.items():
            arguments += ["--secret", f"{name}:{key}={value}"]
    for name, option in (options or {}).items():
        arguments += ["--option", f"{name}={option}"]
    for key, value in (env or {}).items():
        arguments += ["--env", f"{key}={value}"]
    for path in share:
        arguments += ["--share", str(path)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "env.json"
        process = subprocess.Popen(
            [*arguments, "--stop-at-eof", "--env-file", str(file)],
            env=environment,
            stdin=subprocess.PIPE,  # ends with this process, however it ends
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + START_SECONDS
        while not file.exists():
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(f"modal_local did not start (exit status {process.wait()})")
            time.sleep(POLL_SECONDS)
        found = json.loads(file.read_text())
    return LocalModal(found, found["MODAL_LOCAL_ADMIN"], process)
