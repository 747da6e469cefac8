"""What the scripts share: `command` makes a stage's main of conf/ and the command line, `run` calls
the stage. It is where Hydra begins; the rest of the package does not know it."""

import sys
from collections.abc import Callable
from pkgutil import resolve_name

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from specforge_exp.config import Config, from_omegaconf, repository
from specforge_exp.config.keys import unknown_key
from specforge_exp.errors import InputError

Task = Callable[[DictConfig], object]


def command(task: Task) -> Callable[[], None]:
    """As `hydra.main`, but for the first word `status`, which is short for regen.status=true, and
    for an unknown key: Hydra names it, this also says what would be right.
    """

    def main() -> None:
        version.setbase("1.3")
        store = ConfigStore.instance()
        store.store(name="schema", node=Config)
        words = sys.argv[1:]
        if words[:1] == ["status"]:
            words[0] = "regen.status=true"
        parser = get_args_parser()
        arguments = parser.parse_intermixed_args(words)  # flags may stand anywhere
        if problem := unknown_key(arguments.overrides, Config):
            sys.exit(f"error: {problem}")
        if arguments.experimental_rerun:
            sys.exit("error: --experimental-rerun reads a pickle; run the command again instead")
        if arguments.help:  # Hydra copies the store for every group; there is one per process
            vars(store)["__deepcopy__"] = lambda memo: store
        _run_hydra(arguments, parser, task, repository("conf"), "config")

    return main


def run(stage: str, cfg: DictConfig) -> object:
    """Call a stage, named as `package.module:function`, with the typed configuration.

    What a user can mend ends the process with one line.
    """
    try:
        config = from_omegaconf(cfg)
        return resolve_name(stage)(config)  # loads torch
    except InputError as error:
        raise CompactHydraException(f"error: {error}") from None
