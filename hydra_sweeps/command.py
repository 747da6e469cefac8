"""The command of a sweep: how it was typed, what of it a run alone needs, how it ends."""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import cast

from omegaconf import DictConfig, OmegaConf

from hydra_sweeps.jobs import without_hydra
from hydra_sweeps.overrides import key_of
from hydra_sweeps.records import reason

CONFIG_FLAGS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
SWEEP_ONLY = ("hydra/sweeper", "hydra.sweeper", "hydra.mode", "hydra.run.")
"""Overrides of Hydra's node that make no difference to a job of a sweep."""
MULTIRUN_ONLY = ("hydra/launcher", "hydra.launcher", "hydra.sweep.")
"""Those that say where it runs and writes."""
log = logging.getLogger(__name__)


class Terminated(BaseException):
    """SIGTERM, as an exception that no job catches."""


def command_line(argv: Sequence[str] | None = None) -> str:
    """This process's command, for a shell."""
    return shlex.join(["python", *(argv or sys.argv)])


def run_command(overrides: Sequence[str], hydra: Sequence[str] = (), multi: bool = False) -> str:
    """The command that reproduces one run alone.

    Args:
        overrides: the job's own.
        hydra: overrides of Hydra's node.
        multi: with -m.
    """
    flags, words = [], sys.argv[1:]
    for index, word in enumerate(words):
        if word in CONFIG_FLAGS:
            flags += words[index : index + 2]
        elif word.partition("=")[0] in CONFIG_FLAGS:
            flags.append(word)
    multirun = ["-m"] if multi else []
    return command_line([sys.argv[0], *flags, *multirun, *overrides, *hydra])


def hydra_overrides(master: DictConfig) -> list[str]:
    """The command line's overrides of Hydra's node, interpolations as they were written."""
    return cast(list[str], OmegaConf.to_container(master.hydra.overrides.hydra))


def run_overrides(master: DictConfig, multi: bool) -> list[str]:
    """Those of them without which a run alone would be another one, or not be found."""
    without = SWEEP_ONLY if multi else (*SWEEP_ONLY, *MULTIRUN_ONLY)
    return [text for text in hydra_overrides(master) if not key_of(text).startswith(without)]


@contextmanager
def raising_sigterm() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does, and children that are forked here as ever."""
    controller = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == controller:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stopping(stop: Callable[[], None], table: Callable[[], str]) -> Iterator[None]:
    """Call `stop` when the block is interrupted or breaks.

    Args:
        stop: ends what runs and writes it down.
        table: what is printed after Ctrl-C and SIGTERM.

    Raises:
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as interrupt:
        stop()
        print(table(), flush=True)
        print("interrupted; the same command continues", file=sys.stderr, flush=True)
        raise SystemExit(130 if isinstance(interrupt, KeyboardInterrupt) else 143) from None
    except SystemExit:  # a launcher's: its jobs go on without this process
        raise
    except BaseException:
        stop()
        raise


def report(dotted: str | None, master: DictConfig, sweep_dir: Path) -> None:
    """Call hydra.sweeper.report; its failure is a warning."""
    if not dotted:
        return
    try:
        resolve_name(dotted)(without_hydra(master), sweep_dir)
    except (Exception, SystemExit) as error:
        log.warning(f"no report: {reason(error)}")
