"""The command of a sweep: how it was typed, what its jobs may choose, how it ends."""

import json
import logging
import os
import shlex
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import cast

from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_sweeps.errors import SweepError
from hydra_sweeps.jobs import Job, Source, without_hydra
from hydra_sweeps.overrides import key_of
from hydra_sweeps.records import reason

CONFIG_FLAGS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
SWEEP_ONLY = ("hydra/sweeper", "hydra.sweeper", "hydra.mode", "hydra.run.")
"""Overrides of Hydra's node that make no difference to a job of a sweep."""
MULTIRUN_ONLY = ("hydra/launcher", "hydra.launcher", "hydra.sweep.")
"""Those that say where it runs and writes."""
NODES = ("launcher", "sweeper")
"""Of Hydra's node, what a command has one of."""
log = logging.getLogger(__name__)


class Terminated(BaseException):
    """SIGTERM, as an exception that no job catches."""


LOST = {Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}


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


def run_overrides(source: Source, overrides: Sequence[str], multi: bool) -> list[str]:
    """Those of them without which a run alone would be another one, or not be found; and what makes
    it one run where a file that it chooses asks for a search.

    Args:
        overrides: of the run, or what all runs have.
        multi: with -m.
    """
    master, without = source.master, SWEEP_ONLY if multi else (*SWEEP_ONLY, *MULTIRUN_ONLY)
    typed = [text for text in hydra_overrides(master) if not key_of(text).startswith(without)]
    load = source.context.config_loader.load_configuration
    try:
        alone = load(master.hydra.job.config_name, [*typed, *overrides], RunMode.RUN).hydra
    except (HydraException, OmegaConfBaseException):  # what is searched may be what it needs
        return typed
    if multi:
        return [*typed, "hydra.sweeper.n_trials=1"] if "n_trials" in alone.sweeper else typed
    return [*typed, "hydra.mode=RUN"] if alone.mode == RunMode.MULTIRUN else typed


@contextmanager
def raising_sigterm() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does, and children that are forked here as ever.

    Both come once more where Python has no place to raise what they raise: within a `__del__`.
    """
    controller, unraisable = os.getpid(), sys.unraisablehook

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == controller:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def again(lost: "sys.UnraisableHookArgs") -> None:
        number = LOST.get(lost.exc_type)
        if number is None:
            unraisable(lost)
        else:  # from another thread, once this one has left the `__del__`
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread
        yield
        return
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
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


def refuse_other_choices(
    master: DictConfig,
    jobs: Sequence[Job],
    arguments: Sequence[str],
    nodes: Sequence[str] = NODES,
) -> None:
    """Refuse jobs whose own choices set Hydra's launcher or sweeper otherwise than this command.

    Hydra chooses both before it splits the command into jobs, so what a swept option says about
    `hydra.launcher` or `hydra.sweeper` comes too late and would be dropped. A grid is seen whole
    before it begins. Of a study that is every choice of a config group; a point that would choose
    otherwise all the same, say by custom_search_space, is a failed trial.

    Args:
        arguments: the command's overrides as they were typed.
        nodes: of Hydra's node, that are compared.

    Raises:
        SweepError: names the job, what it would have chosen, and the commands to do so.
    """
    for node in nodes:
        ours = written(master, node)
        kinds = [written(job.config, node) for job in jobs]
        other = next((job for job, kind in zip(jobs, kinds, strict=True) if kind != ours), None)
        if other is None:
            continue
        here, name = (
            f"hydra/{node}={config.hydra.runtime.choices.get(f'hydra/{node}')}"
            for config in (master, other.config)
        )
        chosen = f"{name}, and this command has {here}"
        if name == here:
            chosen = f"options of its own for hydra.{node}, and a command has one for all its runs"
        meant = split(jobs, kinds, arguments)
        if len({*kinds}) == 1 and name != here:
            meant = [command_line([*sys.argv, name])]
        way = f"; what was meant: {' ; '.join(meant)}" if meant else ""
        raise SweepError(f"run {other.number} ({other.text}) chooses {chosen}{way}")


def written(config: DictConfig, node: str) -> str:
    """A node of Hydra's as it is written, for comparison."""
    content = OmegaConf.to_container(config.hydra[node])
    return json.dumps(content, sort_keys=True, default=str)


def split(jobs: Sequence[Job], kinds: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """This command as several, one for each kind of job; [] where no single option decides.

    Args:
        kinds: of each job.
    """
    for argument in arguments:
        key = argument.partition("=")[0]
        kinds_of: dict[str, set[str]] = defaultdict(set)
        for job, kind in zip(jobs, kinds, strict=True):
            for word in job.overrides:
                name, _, value = word.partition("=")
                if name == key:
                    kinds_of[value].add(kind)
        groups: dict[str, list[str]] = defaultdict(list)
        for value, several in kinds_of.items():
            groups["".join(sorted(several))].append(value)
        if len(groups) > 1 and all(len(several) == 1 for several in kinds_of.values()):
            parts = [f"{key}={','.join(group)}" for group in groups.values()]
            return [
                command_line([part if word == argument else word for word in sys.argv])
                for part in parts
            ]
    return []
