"""`${oc.env:...}` means one thing: what the launching machine resolves is what the job has.

So it is looked up once, here, and travels with the call and counts for the job's identity. A secret
does not travel: the container resolves those that a Modal secret gives, as it does what
`resolve_there` names.
"""

import os
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from omegaconf import DictConfig, OmegaConf

from modal_sweep.config import JobSettings
from modal_sweep.errors import LaunchError

SECRET_NAME = re.compile(r"TOKEN(?!S)|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
VARIABLE = re.compile(r"(?<!\\)\$\{oc\.env:\s*([^,}]*?)\s*([,}])")


def environ(job: DictConfig, settings: JobSettings, where: str) -> dict[str, str | None]:
    """The variables that a job's configuration reads; None: not set, so that the default counts.

    Args:
        where: the node of its settings.

    Raises:
        LaunchError: a variable that is not set, or that is something else over there; a secret.
    """
    given = settings.image.env | settings.env
    there = {*settings.resolve_there, *job.hydra.job.env_set, *chain(*settings.secrets.values())}
    values: dict[str, str | None] = {}
    listed = f"{where}.resolve_there"
    for key, name, default in variables("", OmegaConf.to_container(job)):
        here = os.environ.get(name)
        value = given.get(name, here)
        if name in there:
            continue
        if value != here and (here is not None or default):
            problem = f"something else in {where}.env than here: list it in {listed}"
        elif value is None and not default:  # or a name that only the job can know
            problem = f"not set here: set it, or {where}.env, or list what the container has in "
            problem += listed
        elif value is not None and name not in given and SECRET_NAME.search(name):
            problem = f"a secret by its name, for no configuration: {where}.secrets gives it"
        else:
            values[name] = value
            continue
        if not key.startswith(".hydra."):  # of that node a job reads next to nothing
            raise LaunchError(
                f"{key[1:]} reads the environment variable {name}, which is {problem}"
            )
    return values


def variables(key: str, node: Any) -> Iterator[tuple[str, str, bool]]:
    """Key, variable and whether it has a default, of every `${oc.env:...}` as it is written."""
    if isinstance(node, dict | list):
        for name, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from variables(f"{key}.{name}", item)
    elif isinstance(node, str):
        for name, end in VARIABLE.findall(node):
            yield key, name.strip("'\""), end == ","
