"""What the scripts share: `command` makes a stage's main of conf/ and the command line, `run` calls
the stage. It is where Hydra begins; the rest of the package does not know it."""

import argparse
import atexit
import gc
import io
import logging
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from hydra import version
from hydra._internal import utils
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from specforge_exp import offline, paths
from specforge_exp.config import Config, from_omegaconf, repository, valueless
from specforge_exp.config.keys import begun_entry, unknown_key
from specforge_exp.errors import InputError, told_by_the_system
from specforge_exp.provenance import code

Task = Callable[[DictConfig], object]


OF_HYDRA = utils.run_and_report
WRITTEN = "an option is written epochs=3, in one word without dashes"


def prepare_streams() -> None:
    """Let every text be printed: what a terminal's encoding lacks as an escape, and to nowhere
    where a stream is closed (`2>&-`). A file of ours would get its number, and with it the lines
    that libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def reported(func: Any) -> Any:
    """As Hydra reports what a call raises, but of what a user can mend the message alone."""

    def quiet() -> Any:
        try:
            with told_by_the_system():
                return func()
        except (InputError, CompactHydraException) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            if isinstance(error, InputError):  # of a sweep's own files
                sys.exit(f"error: {error}")
            cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else ""
            told = "\n".join(filter(None, [str(error), str(cause)]))
            new = begun_entry(sys.argv[1:], Config, told)
            if isinstance(error, OverrideParseException):
                key, _, value = error.override.partition("=")
                how = "quote it: " + shlex.quote(f'{key}="{value}"')
                new = f"{error.override}: {how if value else WRITTEN}"
            sys.exit(f"error: {new}" if new else told)
        except MissingMandatoryValue as error:  # of the sweeper's own options
            root = error.parent_node and error.parent_node._get_root()
            if not (missing := valueless(OmegaConf.to_container(root)) if root else ""):
                raise
            sys.exit(f"error: {missing}")

    return OF_HYDRA(quiet)


def command(task: Task) -> Callable[[], None]:
    """As `hydra.main`, but for the first word `status`, which is short for regen.status=true, for
    chat's --no-draft, which is short for chat.draft=false, for export's `from=`, which is short for
    export.source=, and for an unknown key: Hydra names it,
    this also says what would be right.
    """

    def main() -> None:
        prepare_streams()
        version.setbase("1.3")
        store = ConfigStore.instance()
        store.store(name="schema", node=Config)
        home, stage = os.path.expanduser("~/"), Path(sys.argv[0]).stem
        # Shells leave it as it is behind `option=`, and Hydra does not read it.
        words = [re.sub(r"^([\w.+]+=)~/", lambda m: m[1] + home, word) for word in sys.argv[1:]]
        if words[:1] == ["status"]:
            words[0] = "regen.status=true"
        if stage == "chat":
            words = ["chat.draft=false" if word == "--no-draft" else word for word in words]
        if stage == "export":
            words = [re.sub(r"^from=", "export.source=", word) for word in words]
        # Python 3.14 reads every option's help at once; Hydra's of --shell-completion is no text.
        argparse.ArgumentParser._check_help = lambda *_: None  # type: ignore[attr-defined]
        parser = utils.get_args_parser()
        vars(parser)["error"] = lambda message: sys.exit(f"error: {message}; {WRITTEN}")
        arguments = parser.parse_intermixed_args(words)  # flags may stand anywhere
        options = [] if arguments.shell_completion else arguments.overrides
        if problem := unknown_key(options, Config):
            sys.exit(f"error: {problem}")
        if arguments.experimental_rerun:
            sys.exit("error: --experimental-rerun reads a pickle; run the command again instead")
        if stage == "chat" and arguments.multirun:
            sys.exit("error: a chat is one conversation, so chat takes no -m")
        # Hydra copies the store for every composition and group; there is one per process.
        vars(store)["__deepcopy__"] = lambda memo: store
        utils.run_and_report = reported
        try:
            utils._run_hydra(arguments, parser, task, repository("conf"), "config")
        except KeyboardInterrupt:  # ended by the signal, as without this, but in one line
            print("interrupted; run the same command again", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    return main


@contextmanager
def recorded(cfg: DictConfig, config: Config) -> Iterator[None]:
    """Keep configuration and log of a single call in the folder of its run.

    Other stages have no such folder, and their artifact says in run.json what made it. A job of -m
    has its record in the sweep. A refused call leaves no folder that was not there, one that keeps
    nothing touches none.
    """
    hydra, folder = HydraConfig.get(), paths.run_dir(config)
    stage, new = hydra.job.name, not folder.exists()
    stages = ("train",) if new else ("train", "export", "bench")
    if stage not in stages or config.sweep or config.keeps_nothing:
        yield
        return
    record = folder / ".hydra" / stage
    record.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {
        "config": cfg,
        "hydra": {"hydra": hydra},
        "overrides": hydra.overrides.task,
    }
    for name, content in files.items():
        OmegaConf.save(OmegaConf.create(content), record / f"{name}.yaml")
    handler = logging.FileHandler(folder / f"{stage}.log", encoding="utf-8", errors="replace")
    logging.getLogger().addHandler(handler)
    try:
        yield
    except InputError:
        if new and len(list(folder.iterdir())) == 2:  # these two
            shutil.rmtree(folder)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextmanager
def leaving_nothing(config: Config) -> Iterator[None]:
    """Remove the empty folders above artifacts that a refused call has made."""
    roots = [Path(root).absolute() for root in vars(config.paths).values()]
    above = {folder for root in roots for folder in (root, *root.parents) if not folder.exists()}
    try:
        yield
    except InputError:
        for folder in sorted(above, reverse=True):  # what is inside comes first
            with suppress(OSError):
                folder.rmdir()
        raise


def loaded(stage: str) -> Callable[[Config], object]:
    """A stage's function, with torch and all else that it needs.

    Nothing looks for garbage in what is loaded to stay, here or in a fork. In a process that has it
    already there may be garbage of the job before, which is not to stay.
    """
    there = stage.partition(":")[0] in sys.modules
    gc.disable()
    try:
        function: Callable[[Config], object] = resolve_name(stage)
    finally:
        gc.enable()
    if not there:
        gc.freeze()
        atexit.register(thaw)
    return function


def thaw() -> None:
    """Let the interpreter look for garbage in what is loaded, at its end, where Triton's binding is
    nanobind (Triton 3.9): it tells the user of everything that is left as of a leak."""
    bound = getattr(sys.modules.get("triton._C.libtriton.ir"), "builder", None)
    if type(bound).__module__ == "nanobind":
        gc.unfreeze()


def for_libraries() -> None:
    """What libraries of this process, and of those that it starts, read when they are loaded.

    OpenMP's threads wait for each other at every small operation. They sleep there: as a library
    has it, they turn in circles, for nearly all of a step where other work has their cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def run(stage: str, cfg: DictConfig) -> object:
    """Call a stage, named as `package.module:function`, with the typed configuration.

    What a user can mend ends the process with one line; a job of -m with an exception.
    """
    hydra = HydraConfig.get()
    if Path(hydra.runtime.cwd).is_dir():  # paths are relative to it, whatever hydra.job.chdir says
        os.chdir(hydra.runtime.cwd)
    for_libraries()
    single = hydra.mode == RunMode.RUN
    try:
        config = from_omegaconf(cfg)
        offline.settle(config)
        code(config)  # before any of it is loaded
        record = recorded(cfg, config) if single else nullcontext()
        with leaving_nothing(config), told_by_the_system(), record:
            return loaded(stage)(config)
    except InputError as error:
        if single and os.environ.get("HYDRA_FULL_ERROR") != "1":
            sys.exit(f"error: {error}")
        raise CompactHydraException(f"error: {error}") from None
