"""One command has one launcher and one sweeper: the jobs must have been able to choose no other.

Hydra chooses both before it splits the command into jobs, so what a swept option says about
`hydra.launcher` or `hydra.sweeper` comes too late and would be dropped. A grid is seen whole before
it begins. Of a study that is every choice of a config group; a point that would choose otherwise
all the same, say by custom_search_space, is a failed trial.
"""

import json
import sys
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from hydra_sweeps.command import command_line
from hydra_sweeps.errors import SweepError
from hydra_sweeps.jobs import Job

NODES = ("launcher", "sweeper")


def refuse_other_choices(
    master: DictConfig,
    jobs: Sequence[Job],
    arguments: Sequence[str],
    nodes: Sequence[str] = NODES,
) -> None:
    """Refuse jobs whose own choices set Hydra's launcher or sweeper otherwise than this command.

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
        found: dict[str, set[str]] = {}
        for job, kind in zip(jobs, kinds, strict=True):
            for word in job.overrides:
                if word.partition("=")[0] == key:
                    found.setdefault(word.partition("=")[2], set()).add(kind)
        groups: dict[str, list[str]] = {}
        for value, several in found.items():
            groups.setdefault("".join(sorted(several)), []).append(value)
        if len(groups) > 1 and all(len(several) == 1 for several in found.values()):
            parts = [f"{key}={','.join(group)}" for group in groups.values()]
            return [
                command_line([part if word == argument else word for word in sys.argv])
                for part in parts
            ]
    return []
