"""modal-sweep: come back to a sweep from any process, on any machine that has its directory."""

import argparse
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from modal_sweep.client import commands
from modal_sweep.client.failures import modal_errors
from modal_sweep.errors import LaunchError


def main() -> None:
    """Run a command; exit code 1 when a job failed or something has to be mended."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding lacks is printed as an escape: it is no error.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    arguments = parser().parse_args()
    try:
        with modal_errors():
            sys.exit(arguments.run(arguments))
    except LaunchError as error:
        sys.exit(f"modal-sweep: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def parser() -> argparse.ArgumentParser:
    """Every command with its options; its help is the docstring of its function."""
    top = argparse.ArgumentParser(prog="modal-sweep", description="Sweeps of hydra/launcher=modal.")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], sweep: bool = True
    ) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        if sweep:
            command.add_argument("sweep", type=Path, help="the sweep directory")
        return command

    listing = add("list", commands.list_sweeps, sweep=False)
    listing.add_argument("folder", type=Path, nargs="?", default=Path())
    add("status", commands.status)
    add("attach", commands.attach)
    logs = add("logs", commands.logs)
    logs.add_argument("job", type=int, nargs="?", default=0, help="its number")
    pull = add("pull", commands.pull)
    pull.add_argument("--checkpoints", action="store_true", help="also what `unique` names")
    pull.add_argument("--to", type=Path, default=None, help="folder for --checkpoints")
    cancel = add("cancel", commands.cancel)
    cancel.add_argument("job", type=int, nargs="*", help="numbers; none: all")
    rerun = add("rerun", commands.rerun)
    rerun.add_argument("job", type=int, nargs="*", help="numbers")
    rerun.add_argument("--failed", action="store_true", help="all that did not complete")
    clean = add("clean", commands.clean)
    clean.add_argument("--yes", action="store_true", help="do not ask")
    setup = add("setup", set_up, sweep=False)
    setup.add_argument("script", nargs="?", default="train.py")
    setup.add_argument("overrides", nargs="*", help="as for the script")
    return top


def set_up(arguments: argparse.Namespace) -> int:
    """Make the Volumes a script needs, name missing secrets."""
    # In a process of its own, as a launch would compose the script's configuration.
    if not Path(arguments.script).is_file():
        raise LaunchError(f"{arguments.script} does not exist; usage: setup <script> [overrides]")
    options = ["-m", "hydra/launcher=modal", "hydra.launcher.setup=true"]
    command = [sys.executable, arguments.script, *options, *arguments.overrides]
    return subprocess.run(command, check=False).returncode
