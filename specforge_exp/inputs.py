"""What a stage reads: where it lies, whole, and the commands that make what is missing."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from os.path import normpath
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from specforge_exp import paths
from specforge_exp.artifacts import check, read_record, sha256
from specforge_exp.config import STAGES, Config, from_omegaconf
from specforge_exp.config.checks import typed, usual
from specforge_exp.config.machine import SAME, command
from specforge_exp.errors import InputError

log = logging.getLogger(__name__)

OPTIONS = {
    "prep": "data.train data.eval data.split_eval data.sample_size data.max_turns data.system",
    "regen": (
        "regen.temperature regen.top_p regen.top_k regen.repetition_penalty regen.max_tokens "
        "regen.thinking regen.truncated regen.num_samples regen.samples_per_prompt"
    ),
    "preprocess": (
        "preprocess.source preprocess.overlong preprocess.last_turn_only preprocess.changed_turns "
        "preprocess.thinking model.chat_template_kwargs"
    ),
}
"""Of the stages before a training or a bench: what their products depend on."""


def products(cfg: Config) -> dict[str, Path]:
    """By stage, in order, what it has written when it is complete."""
    answers = {"regen": paths.regen_dir(cfg) / "train.jsonl"}
    return {
        "prep": paths.prompts_dir(cfg) / "train.jsonl",
        **(answers if cfg.preprocess.source == "regen" else {}),
        "preprocess": paths.tokens_dir(cfg) / "index.json",
        "train": paths.run_dir(cfg) / "metrics.jsonl",
        "export": paths.export_dir(cfg) / "run.json",
    }


def read_by(cfg: Config, stage: str) -> str | None:
    """The stage whose product a stage reads; None: none, or it only says something."""
    reads = {"preprocess": cfg.preprocess.source, "train": "preprocess", "sft": "preprocess"}
    reads |= {"bench": "export"} | ({} if cfg.export.source else {"export": "train"})
    reads |= {} if cfg.regen.status or cfg.regen.dry_run else {"regen": "prep"}
    return reads.get(stage)


def lacking(cfg: Config, stage: str) -> list[str]:
    """A stage, after those before it whose products it lacks too."""
    names: list[str] = []
    for name, product in products(cfg).items():
        names = [] if product.exists() and name != stage else [*names, name]
        if name == stage:
            break
    return names


def commands(stages: Iterable[str]) -> str:
    """The commands of these stages, as the end of a message."""
    hint = "preprocess.source=prep does without regen.py" if "regen" in stages else ""
    lines = [command(name, away=False) for name in stages]
    if SAME in lines[0]:
        short = ", ".join(line.replace(f" {SAME}", "") for line in lines)
        return f" {short} {SAME}{hint and f'; {hint}'}"
    return "".join(f"\n  {line}" for line in lines) + (hint and f"\n  # {hint}")


def require(cfg: Config, stage: str, *names: str) -> Path:
    """The folder that a stage has made, which has these files and is what its record says.

    Raises:
        InputError: a file is missing or damaged; names the commands that make it, in order. Or as
            `check_options`.
    """
    folder = products(cfg)[stage].parent
    check(folder, command(stage, f"{stage}.force=true", away=False))
    for name in names:
        if not (folder / name).exists():
            raise InputError(
                f"{folder / name} does not exist; make it with:{commands(lacking(cfg, stage))}"
            )
    if stage in OPTIONS:
        check_options(cfg, stage)
    return folder


def unchanged(inputs: dict[Path, str]) -> None:
    """Files still have the digests with which they were begun to be read.

    Raises:
        InputError: one has not; what was made of it may be half of the one, half of the other.
    """
    for path, digest in inputs.items():
        if not path.exists() or sha256(path) != digest:
            raise InputError(f"{path} has changed while it was read; run the same command again")


def check_options(cfg: Config, stage: str, read: Mapping[str, str] | None = None) -> None:
    """Refuse options of a stage before, or of one before that, which are given and are not those
    that its product was made with: they would change nothing. Those that are left out are said, and
    regen's always.

    Args:
        cfg: the configuration.
        stage: whose product it is.
        read: digests of what was made of it, by name; what is there now may be another.

    Raises:
        InputError: names the options and the command that makes the product again.
    """
    folder = products(cfg)[stage].parent
    if not (folder / "run.json").exists():
        return
    record, now = read_record(folder / "run.json"), plain(asdict(cfg))
    held = record.get("files", {}).get("train.jsonl", {}).get("sha256")
    if held and (read or {}).get(f"{folder.name}/train.jsonl", held) != held:
        log.warning("%s is another by now than what was made of it", folder)
        return
    made, given, left_out = record.get("config", {}), [], []
    for key in OPTIONS[stage].split():
        group, name = key.split(".")
        value, before = now[group][name], made.get(group, {})
        if plain(before.get(name, value)) == value:
            continue
        left = value == plain(usual(vars(cfg)[group], name))
        # A recipe has options of regen for all stages, and many a regen.py has its own; so has many
        # a prep.py the part of a file that it reads.
        if stage == "regen" or left or (places(value) and places(value) == places(before[name])):
            left_out.append(f"{key}={typed(before[name])}")
        else:
            given.append(f"{key} was {typed(before[name])}, now {typed(value)}")
    if given:
        again = command(stage, f"{stage}.force=true", away=False)
        raise InputError(
            f"{folder} was made with other options: {'; '.join(given)}. Give those, or make it "
            f"again with: {again}"
        )
    if left_out:
        log.info("%s was made with %s, which is not given here", folder, ", ".join(left_out))
    sources = {"regen": "prep", "preprocess": made.get("preprocess", {}).get("source")}
    if (source := sources.get(stage)) is not None:
        check_options(cfg, source, record["inputs"])


def places(value: Any) -> list[Any]:
    """Where sources lie, whichever part of them is read; [] of what is no list of sources."""
    sources = plain(value) if isinstance(value, list) else []
    return [each["path"] for each in sources if isinstance(each, dict) and "path" in each]


def plain(value: Any) -> Any:
    """What JSON makes of a value, with paths as they are without `./`."""
    if isinstance(value, dict):
        parts = {key: plain(part) for key, part in value.items()}
        path = parts.get("path")
        return parts | ({"path": normpath(path)} if isinstance(path, str) else {})
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def check_jobs(stage: str, jobs: Sequence[DictConfig]) -> None:
    """What hydra.sweeper.precheck names: refuse jobs whose inputs are missing before one starts.

    A job whose configuration is not valid fails alone.

    Raises:
        InputError: names what is missing, once, and the commands that make it, in order; or they
            are no runs.
    """
    if stage == "train" and any(job.target.alone != "none" for job in jobs):
        raise InputError(
            "target.alone is for one command without -m: it is no run, and a sweep would record it "
            "as one; target.alone=none"
        )
    missing: dict[Path, list[str]] = {}
    for job in jobs:
        with suppress(InputError):
            cfg = from_omegaconf(job)
            source = read_by(cfg, stage)
            if source and not products(cfg)[source].exists():
                missing[products(cfg)[source]] = lacking(cfg, source)
    if missing:
        first, others = next(iter(missing)), len(missing) - 1
        what = f"{first} and {others} more do" if others else f"{first} does"
        made = [name for name in STAGES if any(name in names for names in missing.values())]
        raise InputError(f"{what} not exist, so no job was started; make it with:{commands(made)}")


def check_trials(stage: str, jobs: Sequence[DictConfig]) -> None:
    """`check_jobs` for the trials of a study, which come when they come.

    Raises:
        InputError: as `check_jobs`, or they are to share workers.
    """
    if stage == "train" and any(job.target.share == "sweep" for job in jobs):
        raise InputError(
            "target.share=sweep is for grids: trials of a study begin one after the other; "
            "target.share=none"
        )
    check_jobs(stage, jobs)
