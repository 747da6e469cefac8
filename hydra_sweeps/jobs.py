"""A job before it runs: its configuration, its folder, what identifies it."""

import copy
import hashlib
import os
import posixpath
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, env_override
from hydra.errors import CompactHydraException, HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from hydra_sweeps.errors import SweepError
from hydra_sweeps.overrides import parse, without
from hydra_sweeps.records import digests, first_line

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
VARIABLE = re.compile(r"\$\{oc\.env:\s*([^,${}]*)")
"""Its name; nothing where that is an interpolation."""
INTERPOLATION = re.compile(r"(?<!\\)\$\\?\{")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LONGEST = 255
"""Bytes of a name that file systems take."""
Ends = list[tuple[int, JobReturn]]
"""Jobs that have ended, by their numbers."""
Reports = dict[int, list[dict[str, Any]]]
"""New JSON lines of jobs' progress files, by number of the job."""


@dataclass(frozen=True)
class Source:
    """What jobs are composed of."""

    master: DictConfig
    context: HydraContext


@dataclass
class Job:
    """One composed job."""

    number: int
    overrides: list[str]
    config: DictConfig

    @property
    def text(self) -> str:
        """Its overrides, for messages."""
        return " ".join(self.overrides) or "no overrides"

    @property
    def subdir(self) -> str:
        """Where it writes, below hydra.sweep.dir; `a//b` and `a/./b` are a/b.

        Raises:
            SweepError: that is elsewhere, or no name for a file system.
        """
        text = str(self.required("hydra.sweep.subdir"))
        path = posixpath.normpath(text)
        where = f"hydra.sweep.subdir={text} of run {self.number} ({self.text})"
        if path.startswith("/") or path.split("/")[0] == "..":
            raise SweepError(f"{where} lies outside the sweep's folder, hydra.sweep.dir")
        if any(len(part.encode()) > LONGEST for part in path.split("/")):
            raise SweepError(f"{where} has a name of more than {LONGEST} bytes; shorten it")
        return path

    @property
    def resolved(self) -> list[str]:
        """Its overrides, interpolations replaced by their values here; [] where there are none.

        A secret of the environment, and what cannot be resolved here, stays as it was typed.
        """
        texts = list(self.overrides)
        with job_config(self.config), env_override(self.config.hydra.job.env_set):
            secrets = [value for name, value in os.environ.items() if SECRET_NAME.search(name)]
            for index, text in enumerate(self.overrides):
                key = text.partition("=")[0]
                if INTERPOLATION.search(text):
                    with suppress(SweepError):
                        value = str(self.value(key.lstrip("+")))
                        hidden = any(secret and secret in value for secret in secrets)
                        texts[index] = text if hidden else f"{key}={value}"
        return texts if texts != self.overrides else []

    @property
    def record(self) -> dict[str, Any]:
        """hydra.sweeper.record, resolved."""
        return self.value("hydra.sweeper.record") or {}

    @property
    def inputs(self) -> list[Path]:
        """What hydra.sweeper.inputs names."""
        names = leaves(self.value("hydra.sweeper.inputs") or [])
        return [Path(str(name)) for _, name in names if name]  # "" would be this folder

    def value(self, key: str) -> Any:
        """What a key of its configuration holds, resolved, with `${hydra:...}` meaning this job.

        None when there is no such key.

        Raises:
            SweepError: it cannot be resolved.
        """
        try:
            with job_config(self.config):
                node = OmegaConf.select(self.config, key)
                return (
                    OmegaConf.to_container(node, resolve=True)
                    if OmegaConf.is_config(node)
                    else node
                )
        except OmegaConfBaseException as error:
            text = f"{key} of run {self.number} ({self.text}): {first_line(error)}"
            raise SweepError(text) from None

    def required(self, key: str) -> Any:
        """The same; SweepError when there is no such key."""
        value = self.value(key)
        if value is None:
            raise SweepError(f"{key}, which hydra.sweeper names, is not in the configuration")
        return value

    def depends_on_number(self) -> bool:
        """Whether its folder is another one under another job number."""
        other = Job(self.number, self.overrides, copy.deepcopy(self.config))
        other.renumber(self.number + 1_000_003)
        return other.subdir != self.subdir

    def renumber(self, number: int) -> None:
        """Number it, as a launcher would."""
        self.number = number
        with read_write(self.config.hydra), open_dict(self.config.hydra):
            self.config.hydra.job.id = number
            self.config.hydra.job.num = number

    def digest(self, ignore: Sequence[str] = ()) -> str:
        """Hash of the configuration as written, without Hydra's node and the keys to ignore, of
        what it reads from the environment, and of what hydra.sweeper.inputs names.

        `${now:...}` and `${hydra:...}`, which another start changes, count as written; so does any
        other resolver.
        """
        try:
            values = self.environment(ignore)
        except SweepError:  # they are resolved where the job runs
            values = {}
        text = OmegaConf.to_yaml(OmegaConf.create(self.written(ignore)), sort_keys=True)
        text += "".join(f"{key}={value!r}\n" for key, value in values.items())
        for path in self.inputs:
            text += "".join(f"\n{digest}" for digest in digests(path))
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def written(self, ignore: Sequence[str]) -> Any:
        """The configuration unresolved, without Hydra's node and the keys to ignore."""
        content: Any = OmegaConf.to_container(self.config, resolve=False)
        for key in ("hydra", *ignore):
            *above, last = key.split(".")
            node = content
            for part in above:
                node = node.get(part, {}) if isinstance(node, dict) else {}
            if isinstance(node, dict):
                node.pop(last, None)
        return content

    def environment(self, ignore: Sequence[str] = ()) -> dict[str, Any]:
        """By key: the values that are made of environment variables that are set, in the
        environment that hydra.job.env_set gives the job.

        Where no variable is set the written default is the value.

        Raises:
            SweepError: one cannot be resolved; names the variable and the key.
        """
        values, key = {}, "hydra.job.env_set"
        texts = {path: text for path, text in leaves(self.written(ignore))
                 if isinstance(text, str) and VARIABLE.search(text)}  # fmt: skip
        try:
            with (
                job_config(self.config),
                env_override(self.config.hydra.job.env_set if texts else {}),
            ):
                for path, text in texts.items():
                    key = ".".join(map(str, path)) + f"={text}"
                    value = reduce(lambda node, part: node[part], path, self.config)
                    names = [name.strip("'\" ") for name in VARIABLE.findall(text)]
                    if any(not name or name in os.environ for name in names):
                        values[key] = value
        except OmegaConfBaseException as error:
            reason = f"{key} of run {self.number} ({self.text}): {first_line(error)}"
            raise SweepError(reason) from None
        return values


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The values of a container and where they stand."""
    if isinstance(content, dict | list):
        for part, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, (*path, part))
    else:
        yield path, content


def check_environment(jobs: Sequence[Job], launcher: Any, ignore: Sequence[str] = ()) -> None:
    """Refuse, before one starts, jobs that lack an environment variable, or would write a secret.

    A launcher that sends jobs to other machines has rules of its own.
    """
    if hasattr(launcher, "session"):
        return
    for job in jobs:
        job.environment(ignore)
        for name in job.config.hydra.job.env_copy or []:
            if SECRET_NAME.search(name):
                raise SweepError(
                    f"hydra.job.env_copy={name} would write its value into multirun.yaml and "
                    ".hydra/hydra.yaml; leave it out: jobs on this machine have the environment of "
                    "this command"
                )


def without_hydra(config: DictConfig) -> DictConfig:
    """A configuration as a task gets it."""
    keys = [key for key in config if key != "hydra"]
    return OmegaConf.masked_copy(config, keys)  # type: ignore[arg-type]


def check_inputs(dotted: str | None, jobs: Sequence[Job], launcher: Any) -> None:
    """Call hydra.sweeper.precheck with what is about to run, as `check_environment`.

    Raises:
        SweepError: it raises something.
    """
    if not dotted or not jobs or hasattr(launcher, "session"):
        return
    try:
        script = jobs[0].config.hydra.job.name
        resolve_name(dotted)(script, [without_hydra(job.config) for job in jobs])
    except Exception as error:
        raise SweepError(str(error)) from error


@contextmanager
def surrounded(
    dotted: str | None, jobs: Sequence[Job], folder: Path, places: int | None
) -> Iterator[None]:
    """Open hydra.sweeper.around for what is about to run.

    Raises:
        SweepError: it refuses.
    """
    with ExitStack() as stack:
        if dotted and jobs:
            configs = [without_hydra(job.config) for job in jobs]
            try:
                opened = resolve_name(dotted)(
                    jobs[0].config.hydra.job.name, configs, folder, places
                )
                stack.enter_context(opened)
            except Exception as error:
                raise SweepError(str(error)) from error
        yield


def resolved_sweep_dir(master: DictConfig) -> Path:
    """hydra.sweep.dir; where it needs `${hydra:...}`, it is resolved for all that look later.

    Raises:
        SweepError: it cannot be resolved.
    """
    try:
        with job_config(master):
            text = str(master.hydra.sweep.dir)
    except OmegaConfBaseException as error:
        raise SweepError(f"hydra.sweep.dir cannot be resolved: {first_line(error)}") from None
    written = OmegaConf.to_container(master.hydra.sweep)
    if isinstance(written, dict) and "${hydra:" in str(written["dir"]):
        with read_write(master.hydra.sweep):
            master.hydra.sweep.dir = text
    return Path(text)


def compose(source: Source, overrides: Sequence[str], number: int) -> Job:
    """A job's configuration, as Hydra's own launchers make it.

    Raises:
        SweepError: it cannot be composed.
    """
    loader = source.context.config_loader
    try:
        with uninterrupted():
            config = loader.load_sweep_config(source.master, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = first_line(error.__cause__) if error.__cause__ else ""
        reason = f"{error} {cause}".strip()
        text = f"run {number} ({' '.join(overrides)}) cannot be composed: {reason}"
        raise SweepError(text) from None
    job = Job(number, list(overrides), config)
    job.renumber(number)
    return job


def rename(source: Source, job: Job, key: str, name: str, text: str) -> None:
    """Give a job a name by an override: what composing it once more would make.

    Args:
        source: what it was composed of.
        job: it, with or without an override of the key.
        key: which option names it.
        name: what that is to hold.
        text: the same as the value of an override.
    """
    job.overrides = [*without(job.overrides, key), f"{key}={text}"]
    OmegaConf.update(job.config, key, name)
    own = [one for one in parse(source.context.config_loader, job.overrides)
           if not one.is_hydra_override()]  # fmt: skip
    node = job.config.hydra
    with read_write(node):
        node.overrides.task = [one.input_line for one in own]
        node.job.override_dirname = get_overrides_dirname(own, **node.job.config.override_dirname)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM count when the block has ended.

    Within a library's clean-up an interrupt becomes another error, and that would be the job's.
    """
    caught: list[int] = []
    try:
        handlers = {
            number: signal.signal(number, lambda number, _: caught.append(number))
            for number in SIGNALS
        }
    except ValueError:  # only the main thread is interrupted
        yield
        return
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for first in caught[:1]:
            signal.raise_signal(first)


@contextmanager
def job_config(config: DictConfig) -> Iterator[None]:
    """`${hydra:...}` means this job."""
    hydra = HydraConfig.instance()
    before: Any = hydra.cfg
    # Itself: `set_config` copies Hydra's node, which takes 9 ms a value.
    hydra.cfg = config  # type: ignore[assignment]
    try:
        yield
    finally:
        hydra.cfg = before


def failure(overrides: Sequence[str], error: Exception) -> JobReturn:
    """The record of a job that has no configuration, or none that is known here."""
    return JobReturn(list(overrides), status=JobStatus.FAILED, _return_value=error)


def show_failure(returned: JobReturn) -> None:
    """Print why a job failed where its output is; Hydra's launchers do not."""
    error = returned._return_value
    if isinstance(error, CompactHydraException):
        print(error, file=sys.stderr, flush=True)
    elif isinstance(error, BaseException):
        traceback.print_exception(error)
