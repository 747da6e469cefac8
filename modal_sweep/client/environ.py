"""`${oc.env:...}` means one thing: what the launching machine resolves is what the job has.

So it is looked up once, here, and travels with the call and counts for the job's identity. A secret
does not travel: the container resolves those that a Modal secret gives, as it does what
`resolve_there` names.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from modal_sweep.config import JobSettings
from modal_sweep.errors import LaunchError

SECRET_NAME = re.compile(r"TOKEN(?!S)|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
VARIABLE = re.compile(r"(?<!\\)\$\{oc\.env:\s*([^,}]*?)\s*([,}])")


Values = dict[str, str | None]
"""By variable; None: not set, so that the default counts."""


def environ(job: DictConfig, settings: JobSettings, where: str) -> tuple[Values, Values]:
    """The variables that a job's configuration reads: what its task gets, and all others.

    Args:
        where: the node of its settings.

    Raises:
        LaunchError: a variable that is not set, or that is something else over there; a secret.
    """
    given = {**settings.image.env, **settings.env}
    there = {*settings.resolve_there, *job.hydra.job.env_set}
    there.update(key for keys in settings.secrets.values() for key in keys)
    own, others = Values(), Values()
    for key, name, default in variables(job):
        if name in there:
            continue
        root = key.partition(".")[0]
        here, text = os.environ.get(name), f"{key} reads the environment variable {name}, "
        is_secret = here is not None and name not in given and SECRET_NAME.search(name)
        problem, remedy = "", f"list it in {where}.resolve_there to take the job's"
        if not name.isidentifier():
            problem, remedy = "which is not known before the job runs", "write its name out"
        elif is_secret:
            problem = "a secret by its name, which is written into no job's configuration"
            remedy = f"give it with {where}.secrets={{<name>: [{name}]}}"
        elif name in given and given[name] != here and (here is not None or default):
            problem = f"which is {here or 'not set'} here and {given[name]} in {where}.env"
        elif name not in given and here is None and not default:
            problem = "which is not set here"
            remedy = (
                f"set it, or give it with {where}.env={{{name}: ...}}; if the container has "
                f"it by itself, list it in {where}.resolve_there"
            )
        if not problem:
            (others if root in ("hydra", where) else own)[name] = given.get(name, here)
        elif root != "hydra":  # of that node a job reads next to nothing
            raise LaunchError(f"{text}{problem}; {remedy}")
    return own, others


def variables(job: DictConfig) -> Iterator[tuple[str, str, bool]]:
    """Key, variable and whether it has a default, of every `${oc.env:...}` as it is written."""

    def walk(key: str, node: Any) -> Iterator[tuple[str, str, bool]]:
        if isinstance(node, dict | list):
            for name, item in node.items() if isinstance(node, dict) else enumerate(node):
                yield from walk(f"{key}.{name}" if key else str(name), item)
        elif isinstance(node, str):
            for match in VARIABLE.finditer(node):
                yield key, match[1].strip("'\""), match[2] == ","

    return walk("", OmegaConf.to_container(job))
