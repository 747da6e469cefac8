"""What a stage runs on when a launcher sends it elsewhere, beyond what conf/resources says."""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import DictConfig

from specforge_exp import paths
from specforge_exp.config import Config, PathsConfig, from_omegaconf
from specforge_exp.config.resolvers import MATTERS, PACKAGE, REPOSITORY, SCRIPTS
from specforge_exp.errors import InputError

CONFIG_FLAGS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
HYDRAS = ("hydra/launcher=", "hydra.searchpath=")
"""Options of Hydra's node that go with a command."""
ASKING = ("prep.check=true", "regen.status=true")
"""Options with which a stage only says something."""
SAME = "(with the same options)"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FOLDER = re.compile(r"hub:([/.~][^:]*).*")
"""A folder of this machine in the hub's layout."""


def machine(stage: str, job: DictConfig) -> dict[str, Any]:
    """The settings that resources.machine adds for a stage; resources.tasks.<stage> wins over them.

    Raises:
        InputError: the job's configuration is not valid.
    """
    here = from_omegaconf(job)
    env, volumes, gpu = (here.resources[key] for key in ("env", "volumes", "gpu"))
    roots = PathsConfig(env["SPECFORGE_DATASETS"], env["SPECFORGE_CHECKPOINTS"])
    there = replace(here, paths=roots)
    run = paths.run_dir(there)
    needs = partial(need, here, there)
    path = prefetched(here.model.path)
    model = {"volume": volumes[env["HF_HOME"]], "path": path, "remedy": command("prefetch")}
    answers = prompts = needs(paths.prompts_dir, "prep")
    if here.preprocess.source == "regen":
        answers = needs(paths.regen_dir, "regen", model, prompts)
    tokens = needs(paths.tokens_dir, "preprocess", model, answers)
    # Never uploaded: here the run's folder may hold no more than a log.
    trained = {**needs(paths.run_dir, "train", model, tokens), "local": None}
    gpus = {"sglang": gpu, "vllm": gpu, "transformers": one_gpu(gpu)}
    stages: dict[str, dict[str, Any]] = {
        "prefetch": cores(4, 16),
        "prep": {**cores(2, 16), "unique": [str(paths.prompts_dir(there))]},
        "regen": {  # with engine=modal it only waits for containers that have the GPUs
            **cores(4, 64, gpus.get(here.engine.name)),
            "unique": [str(paths.regen_dir(there))],
            "requires": [model, prompts],
        },
        "preprocess": {
            **cores(8, 32),
            "unique": [str(paths.tokens_dir(there))],
            "requires": [model, answers],
        },
        "train": {
            "unique": [str(run)],
            "progress_file": f"{run}/metrics.jsonl",
            "outputs": [f"{run}/{name}" for name in ("evaluation.json", "run.json")],
            "progress_keys": measured(here.objectives),
            "checkpoints": f"{run}/step-*[0-9]",  # not .partial
            "requires": [model, tokens, *begun_with(here, there)],
        },
        "export": {  # loads the target in float32 to compare: 4 bytes per weight
            **cores(4, 64),
            "timeout": 14400,
            "unique": [str(paths.export_dir(there))],
            "requires": [model, *([] if here.export.source else [tokens, trained])],
        },
        "bench": {  # not resumed: an attempt has to be long enough
            **cores(4, 64, one_gpu(gpu)),
            "timeout": 28800,
            "hours": 4,
            "unique": [f"{run}/bench-{here.bench.name}-{here.engine.name}"],
            "requires": [model, prompts, needs(paths.export_dir, "export", tokens, trained)],
        },
    }
    own = {**stages["train"], "progress_keys": ["eval/loss"]}
    stages |= {"sft": own, "pretrain": {**own, "requires": [model]}}
    refuse_shallow(stage, here)
    return read_there(stage, here, stages.get(stage, {}))


def refuse_shallow(stage: str, here: Config) -> None:
    """What regen itself refuses first, before it is sent to a container that is paid for."""
    if stage == "regen" and resolve_name("specforge_exp.artifacts:files_of")(here.model.path):
        resolve_name("specforge_exp.stages.regen:check_layers")(here)  # which loads torch


def need(
    here: Config, there: Config, folder: Callable[[Config], Path], maker: str, *requires: Any
) -> dict[str, Any]:
    """A folder on a Volume, and what makes it; what is here instead may be uploaded."""
    path, roots = folder(there), there.paths
    root = roots.datasets if path.is_relative_to(roots.datasets) else roots.checkpoints
    place = {"volume": here.resources["volumes"][root], "path": path.relative_to(root).as_posix()}
    made = {"remedy": command(maker), "requires": [*requires]}
    return {**place, "local": str(folder(here)), "record": "run.json", **made}


def read_there(stage: str, here: Config, own: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings; they require the files of prompts or text that it reads itself, too, on
    the Volumes where they lie.

    Raises:
        InputError: no container has such a file.
    """
    volumes, image = here.resources["volumes"], here.resources["image"]
    shipped = [REPOSITORY / name for name in image.get("sources") or []]
    needs = [*own.get("requires", [])]
    for key, path in own_sources(stage, here).items():
        place = Path(path).expanduser()
        baked = image.get("base") and place.is_absolute() and not place.exists()
        if baked or any(place.is_relative_to(folder) for folder in shipped):
            continue
        mount = next((root for root in volumes if place.is_relative_to(root)), None)
        root = mount or here.resources["env"]["SPECFORGE_DATASETS"]
        name = place.relative_to(mount).as_posix() if mount else place.name
        put = shlex.join(["modal", "volume", "put", volumes[root], "..." if mount else path, name])
        if mount is None:
            alone = "; or run this without -m: later stages bring what prep makes here along"
            raise InputError(
                f"{key}={path} is a path of this machine, which no container has. Bring it with "
                f"`{put}` and give {key}={root}/{name}{alone * (stage == 'prep')}"
            )
        needs.append({"volume": volumes[root], "path": name, "remedy": put})
    return own | {"requires": needs}


def own_sources(stage: str, here: Config) -> dict[str, str]:
    """Files and folders that no other stage makes, by the options that name them."""
    lists: dict[str, Any] = {
        "prep": {"data.train": here.data.train, "data.eval": here.data.eval},
        "pretrain": {"pretrain.sources": here.pretrain.sources},
    }
    paths = {
        f"{key}[{number}].path": str(source.path)
        for key, sources in lists.get(stage, {}).items()
        for number, source in enumerate(sources)
    }
    if stage == "bench" and not here.bench.suite:
        paths = {f"bench.datasets.{k}.path": v.path for k, v in here.bench.datasets.items()}
    return {
        "data.path" if path == here.data.path else key: FOLDER.sub(r"\1", path)
        for key, path in paths.items()
        if FOLDER.match(path) or not path.startswith(("hub:", "synthetic:"))
    }


def begun_with(here: Config, there: Config) -> list[dict[str, Any]]:
    """What trainer.init names, on the Volume of the runs: what is elsewhere no container has."""
    if (init := here.trainer.init) is None:
        return []
    root = there.paths.checkpoints
    folder = Path(root, init)
    path = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else init
    record = "state.json" if folder.name.startswith("step-") else "run.json"
    return [{"volume": here.resources["volumes"][root], "path": path, "record": record}]


def measured(objectives: list[str]) -> list[str]:
    """What a study may prune by, as metrics.jsonl calls it."""
    return [f"eval/{name}" for name in dict.fromkeys(["simulated_length", "loss", *objectives])]


def cores(count: int, gib: int, gpu: Any = None) -> dict[str, Any]:
    """Settings of a machine with so many cores, so much memory and this GPU."""
    return {"cpu": count, "memory": gib * 1024, "gpu": gpu}


def one_gpu(gpu: Any) -> Any:
    """`H100:8` -> `H100`, each of a list; null stays null."""
    if isinstance(gpu, Sequence) and not isinstance(gpu, str):
        return [one_gpu(name) for name in gpu]
    return gpu.partition(":")[0] if gpu else None


def on_the_hub(path: str) -> bool:
    """Whether model.path is a hub id and no folder of this machine."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def prefetched(path: str) -> str | None:
    """What prefetch leaves below HF_HOME when a model is whole; None for a local folder."""
    return "prefetched/models--" + path.replace("/", "--") if on_the_hub(path) else None


def program(stage: str) -> list[str]:
    """What is typed before a stage's options: its script beside the one that runs, or `specforge`
    where that is the installed package's."""
    running = Path(sys.argv[0])
    if running.is_absolute() and running.parent == REPOSITORY != PACKAGE.parent:
        return ["specforge", stage]
    beside = running.stem in SCRIPTS
    return ["python", str(running.with_name(f"{stage}.py")) if beside else f"{stage}.py"]


def script(stage: str) -> str:
    """`program`, for a shell."""
    return shlex.join(program(stage))


def command(stage: str, *more: str, away: bool = True) -> str:
    """The command of another stage with the options of this command line that matter to it.

    It works as it is printed: a list of values has -m before it, `--config-dir` comes along.

    Args:
        stage: the script.
        more: options that it has besides.
        away: with -m, so that a launcher runs it; else with -m where this command line has it.
    """
    ours = Path(sys.argv[0]).stem in SCRIPTS
    ours = ours and not any(word.startswith("sweep=") for word in sys.argv)  # it is of other runs
    words, matters = sys.argv[1:] if ours else [], MATTERS.get(stage)
    flags = ["-m"] if away or {"-m", "--multirun"} & {*words} else []
    options = []
    for place, word in enumerate(words):
        option = re.split(r"[./@=]", word.lstrip("+~"))[0]
        if word.partition("=")[0] in CONFIG_FLAGS:
            flags += words[place : place + 1 + ("=" not in word)]
        elif (
            "=" in word and word[0] != "-" and word not in (*ASKING, "hydra/launcher=basic" * away)
        ):
            known = option not in ("hydra", "from") or (option, stage) == ("from", "export")
            mattering = known and (matters is None or option in matters.split())
            options += [word] * (mattering or word.startswith(HYDRAS))
    line = shlex.join([*program(stage), *flags, *options, *more])
    return line if ours else f"{line} {SAME}"
