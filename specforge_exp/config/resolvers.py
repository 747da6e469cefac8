"""The functions behind `${name:...}` in conf/.

A launcher pickles them with the configuration, so they are functions of a module that the
container has too: what depends on the machine, as `repository`, is then answered there.
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STAGES = ("prefetch", "prep", "regen", "preprocess", "train", "export", "bench")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MATTERS = {
    "prefetch": "experiment model",
    "prep": "experiment data paths",
    "regen": "experiment data paths model engine regen max_length seed",
    "preprocess": "experiment data paths model max_length draft preprocess",
}
"""Options that an early stage depends on; to the other stages all do."""


def folder_name(path: str) -> str:
    """Last part of a path or hub id, in characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(path).name).strip("-.") or "unnamed"


def repository(path: str) -> str:
    """A path below the checkout."""
    return str(REPOSITORY / path)


def gpu_count(gpu: Any, device: str = "auto") -> int:
    """`H100:8` -> 8; a list counts as its first; without a GPU, or on device=cpu, 1."""
    first = gpu[0] if isinstance(gpu, Sequence) and not isinstance(gpu, str) else gpu
    count = str(first).partition(":")[2]
    return int(count) if count.isdigit() and device != "cpu" else 1


def one_gpu(gpu: Any) -> Any:
    """`H100:8` -> `H100`, each of a list; null stays null."""
    if isinstance(gpu, Sequence) and not isinstance(gpu, str):
        return [one_gpu(one) for one in gpu]
    return gpu.partition(":")[0] if gpu else None


def regen_gpu(engine: str, gpu: Any) -> Any:
    """What regen's own process needs: all GPUs for servers of its own, one, or none."""
    return {"sglang": gpu, "transformers": one_gpu(gpu)}.get(engine)


def both_secrets(one: Mapping[str, list[str]], other: Mapping[str, list[str]]) -> dict[str, Any]:
    """The keys of both, by secret."""
    names = [*one, *(name for name in other if name not in one)]
    return {name: [*one.get(name, []), *other.get(name, [])] for name in names}


def prefetched(path: str) -> str | None:
    """What prefetch leaves below HF_HOME when a model is whole; None for a local folder."""
    if not HUB_ID.fullmatch(path) or Path(path).exists():
        return None
    return "prefetched/models--" + path.replace("/", "--")


def answers(source: str, data: str, model: str) -> str:
    """Name of the folder that preprocess reads: the target's answers, or the data's own."""
    return f"{data}--{model}" if source == "regen" else data


def when_losses_differ(stage: str, many: str, one: str) -> str:
    """`many` for the stages whose results depend on the loss, `one` for those before."""
    return one if stage in MATTERS else many


def output_folder(checkpoints: str, run_name: str, sweep: str | None) -> str:
    """Where Hydra keeps the record of a call: the run's folder, or the one that sweep= names."""
    if sweep is None:
        return str(Path(checkpoints) / run_name)
    sweeps = Path(checkpoints) / "sweeps"
    folders = (Path(sweep), sweeps / sweep)
    return str(next((folder for folder in folders if folder.is_dir()), sweeps))


def returned(stage: str, objectives: Sequence[str]) -> list[str]:
    """Names of what a stage returns."""
    return {"train": list(objectives), "bench": ["accepted_length"]}.get(stage, [])


def directions(names: Sequence[str]) -> list[str]:
    """Whether more or less of each returned value is better."""
    return ["minimize" if name in ("loss", "gpu_hours") else "maximize" for name in names]


def if_done(stage: str, resume: bool) -> str:
    """Whether -m leaves a finished run alone; the other stages look for what has changed."""
    return "skip" if stage == "train" and resume else "rerun"


def command(stage: str) -> str:
    """The -m command of another stage with the options of this command line that matter to it."""
    matters = MATTERS.get(stage)
    kept = []
    for override in own_overrides():
        option = re.split(r"[./@=]", override.lstrip("+~"))[0]
        launcher = override.startswith("hydra/launcher=")
        if launcher or (option != "hydra" and (matters is None or option in matters.split())):
            kept.append(shlex.quote(override))
    return " ".join([f"python {stage}.py -m", *kept])


def own_overrides() -> list[str]:
    """The options of this command line, without flags and without the launcher for here."""
    return [
        override
        for override in sys.argv[1:]
        if "=" in override and override[0] != "-" and override != "hydra/launcher=basic"
    ]


def register() -> None:
    """Make them known to OmegaConf under their own names."""
    functions = (
        folder_name, repository, gpu_count, one_gpu, regen_gpu, both_secrets, prefetched, answers,
        when_losses_differ, output_folder, returned, directions, if_done, command,
    )  # fmt: skip
    for function in functions:
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
