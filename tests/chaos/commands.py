"""Starts the project's own scripts by forks of a process that has imported what they import.

A command here costs a second instead of seven, so hundreds of faults are affordable. The forking
process never enters Hydra, and each command has a session of its own to be killed by.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 300.0


def preload() -> None:
    """Import what the stages import."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    import hydra  # noqa: F401
    import torch
    import transformers

    import specforge_exp.cli
    import specforge_exp.stages.bench
    import specforge_exp.stages.export
    import specforge_exp.stages.prep
    import specforge_exp.stages.preprocess
    import specforge_exp.stages.regen
    import specforge_exp.stages.train  # noqa: F401

    torch.set_num_threads(1)
    assert transformers.AutoModelForCausalLM is not None  # its modules load at first use


@dataclass
class Command:
    """A started script."""

    words: list[str]
    pid: int
    log: Path
    began: float
    code: int | None = None

    def ended(self) -> bool:
        """Whether it has ended on its own or by a signal; `code` is then its exit status."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        """Its exit status; TimeoutError when it hangs."""
        while not self.ended():
            if time.monotonic() - self.began > TIMEOUT:
                self.kill()
                raise TimeoutError(f"{' '.join(self.words)} hangs:\n{self.text()}")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def kill(self) -> bool:
        """SIGKILL for all of its session; whether it was still running."""
        if self.ended():
            return False
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no session of its own yet
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.code = -signal.SIGKILL
        return True

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


def start(words: list[str], folder: Path, log: Path) -> Command:
    """Run `<words[0]>.py <words[1:]>` in `folder`, its output in `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    pid = os.fork()
    if pid:
        return Command(words, pid, log, began)
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        script = str(REPOSITORY / f"{words[0]}.py")
        sys.argv = [script, *words[1:]]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError("a fork has ended")


def run(words: list[str], folder: Path, log: Path) -> Command:
    """Run a script to its end."""
    command = start(words, folder, log)
    command.wait()
    return command


def orphans(folder: Path) -> list[str]:
    """Command lines of living processes that name `folder`, without this one."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(folder) in line and state != "Z" and int(entry.name) != os.getpid():
            lines.append(f"{entry.name} {line}")
    return lines
