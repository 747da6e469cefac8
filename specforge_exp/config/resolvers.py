"""The functions behind `${name:...}` in conf/.

A launcher pickles them with the configuration, so they are functions of a module that the
container has too: what depends on the machine, as `repository`, is then answered there.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from specforge_exp.config.own_code import own_files

PACKAGE = Path(__file__).resolve().parent.parent
REPOSITORY = PACKAGE / "files" if (PACKAGE / "files").is_dir() else PACKAGE.parent
"""The checkout; of an installed package, what the wheel has of it."""
OF_THE_MODEL = ("pretrain", "sft")
"""Stages that train the model itself."""
SCRIPTS = (
    "prefetch", "prep", "regen", "preprocess", "train", "export", "bench", "report", "chat",
    *OF_THE_MODEL,
)  # fmt: skip
STAGES = tuple(name for name in SCRIPTS if name not in ("report", "chat"))
"""Those that a launcher sends elsewhere, or that make what another reads."""
MATTERS = {
    "prefetch": "experiment model",
    "prep": "experiment data paths",
    "regen": "experiment data paths model engine regen max_length seed",
    "preprocess": "experiment data paths model max_length draft preprocess",
}
"""Options that an early stage depends on; to the other stages all do."""


def folder_name(path: str) -> str:
    """Last part of a path or hub id, in characters that every file system takes; of a run's export
    the run's own name, as all exports have one."""
    place = Path(path)
    name = place.parent.name if place.name == "export" else place.name
    return re.sub(r"[^A-Za-z0-9._+]+", "-", name).strip("-.") or "unnamed"


def repository(path: str) -> str:
    """A path below the checkout, or the same file of an installed package."""
    return str(REPOSITORY / path)


def gpu_count(
    gpu: Any, device: str = "auto", placement: str = "inprocess", workers: int = 0, each: int = 1
) -> int:
    """`H100:8` -> 8, less what the workers of placement=ray have; a list counts as its first;
    without a GPU, or on device=cpu, 1."""
    first = gpu[0] if isinstance(gpu, Sequence) and not isinstance(gpu, str) else gpu
    count = str(first).partition(":")[2]
    if not count.isdigit() or device == "cpu":
        return 1
    return max(1, int(count) - workers * each * (placement == "ray"))


def both_secrets(one: Mapping[str, list[str]], other: Mapping[str, list[str]]) -> dict[str, Any]:
    """The keys of both, by secret."""
    return {name: [*one.get(name, []), *other.get(name, [])] for name in (*one, *other)}


def when_losses_differ(stage: str, many: str, one: str) -> str:
    """`many` for the stages whose results depend on the draft's loss, `one` for the others."""
    return one if stage in (*MATTERS, *OF_THE_MODEL) else many


def in_a_sweep(mode: Any, value: Any, otherwise: Any) -> Any:
    """What Hydra keeps of a job of -m; of a single call `cli` keeps it, once it is not refused."""
    return value if "MULTIRUN" in str(mode) else otherwise


def returned(stage: str, objectives: Sequence[str]) -> list[str]:
    """Names of what a stage returns."""
    names = {"train": list(objectives), "bench": ["accepted_length"]}
    return {**names, "pretrain": ["loss"], "sft": ["loss"]}.get(stage, [])


def directions(names: Sequence[str]) -> list[str]:
    """Whether more or less of each returned value is better."""
    return ["minimize" if name in ("loss", "gpu_hours") else "maximize" for name in names]


def watched(names: Sequence[str]) -> str | None:
    """What metrics.jsonl calls the first of them that an evaluation has: pruning goes by it, so it
    has to go the way of the study; None: it has none of them."""
    known = (name for name in names if name not in ("gpu_hours", "accepted_length"))
    return next((f"eval/{name}" for name in known), None)


def text_paths(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where text to pretrain on lies, if it is here."""
    # A folder may stand in for a data set of the hub.
    places = [re.sub("^hub:([^:]*).*", r"\1", source["path"]) for source in sources]
    return [str(Path(place).expanduser()) for place in places]


def own_code(*targets: str) -> list[str]:
    """Files of losses and drafts of one's own."""
    return [str(file) for target in targets for file in own_files(target)]


def if_done(stage: str, resume: bool) -> str:
    """Whether -m leaves a finished run alone; the other stages look for what has changed."""
    return "skip" if stage in ("train", *OF_THE_MODEL) and resume else "rerun"


def register() -> None:
    """Make them known to OmegaConf under their own names."""
    for function in (
        folder_name, repository, gpu_count, both_secrets, when_losses_differ, in_a_sweep,
        returned, directions, watched, text_paths, own_code, if_done,
    ):  # fmt: skip
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
