"""`python -m tests.modal_local [OPTIONS] [-- CMD...]`: run CMD against a fresh server, or serve."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from .options import Options, add_secret, set_option
from .server import client_environment, start, stop
from .state import ControlPlane


@dataclass
class Arguments:
    """The command line."""

    options: Options
    env_file: str
    stop_at_eof: bool
    command: list[str]


def parse(arguments: list[str]) -> Arguments:
    """Read the command line."""
    command: list[str] = []
    if "--" in arguments:
        position = arguments.index("--")
        arguments, command = arguments[:position], arguments[position + 1 :]
    parser = argparse.ArgumentParser(prog="modal_local", usage="%(prog)s [OPTIONS] [-- CMD...]")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--state", default="", help="folder that outlives the server")
    parser.add_argument("--secret", action="append", default=[], metavar="NAME:KEY=VALUE")
    parser.add_argument("--option", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--env-file", default="", help="write the client's environment as JSON")
    parser.add_argument("--share", action="append", default=[], metavar="PATH")
    parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--stop-at-eof", action="store_true", help="stop when the standard input ends"
    )
    parser.add_argument("-v", dest="verbose", action="store_true", help="show containers' output")
    given = parser.parse_args(arguments)
    share = tuple(str(Path(path).absolute()) for path in given.share)
    options = Options(state_dir=given.state, port=given.port, share=share, verbose=given.verbose)
    try:
        for text in given.secret:
            add_secret(options, text)
        for text in given.option:
            set_option(options, text)
        for text in given.env:
            key, _, options.container_env[key] = text.partition("=")
    except ValueError as error:
        parser.error(str(error))
    return Arguments(options, given.env_file, given.stop_at_eof, command)


def _write_environment(path: str, environment: dict[str, str]) -> None:
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(environment))
    temporary.replace(path)


def _terminal_signals_all() -> bool:
    """Tell whether a terminal sends its SIGINT to our command as well as to us."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


async def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run the command; pass on the signals that it does not get by itself."""
    loop = asyncio.get_running_loop()
    running: list[asyncio.subprocess.Process] = []
    early: list[signal.Signals] = []

    def pass_on(number: signal.Signals) -> None:
        if number == signal.SIGINT and _terminal_signals_all():
            return
        if not running:
            early.append(number)
        elif running[0].returncode is None:
            running[0].send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, pass_on, number)
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **environment})
    running.append(process)
    for number in early:
        pass_on(number)
    status = await process.wait()
    return status if status >= 0 else 128 - status


def _summary(plane: ControlPlane) -> None:
    if plane.unimplemented:
        counts = ", ".join(f"{name} x{count}" for name, count in plane.unimplemented.items())
        sys.stderr.write(f"modal_local: unimplemented: {counts}\n")


async def main() -> int:
    """Serve, or run the command of the command line."""
    given = parse(sys.argv[1:])
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    loop.add_signal_handler(signal.SIGINT, stopped.set)

    def read_input() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stopped.set()

    if given.stop_at_eof:
        loop.add_reader(0, read_input)
    plane = await start(given.options)
    try:
        environment = client_environment(plane)
        if given.env_file:
            _write_environment(given.env_file, environment)
        if given.command:
            return await _run(given.command, environment)
        for key, value in environment.items():
            print(f"export {key}={value}", flush=True)
        await stopped.wait()
        return 0
    finally:
        _summary(plane)
        await stop(plane)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
