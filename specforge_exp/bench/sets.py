"""The prompts that bench asks, and where they come from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from specforge_exp import paths
from specforge_exp.artifacts import content_of
from specforge_exp.config import REPOSITORY, Config, Source
from specforge_exp.data.conversations import read_jsonl
from specforge_exp.data.sources import depends_on, load
from specforge_exp.errors import InputError
from specforge_exp.inputs import require

SHIPPED = REPOSITORY / "assets" / "bench"
"""One file for each data set of the suite, in its raw schema, of our own writing."""


@dataclass(frozen=True)
class BenchSets:
    """What is asked."""

    records: dict[str, list[dict[str, Any]]]
    """Conversations by data set."""
    origins: dict[str, str]
    """Where each data set comes from: the path of its source, or `shipped`."""
    why: str | None = None
    """Why samples were taken that nobody asked for."""


def bench_sets(cfg: Config) -> BenchSets:
    """The suite, else the named data sets, else the run's held-out conversations.

    All hub data sets of a suite come from the hub, or none: one table never mixes them.

    Raises:
        InputError: a data set cannot be read.
    """
    own = cfg.bench
    if not own.suite:
        if own.datasets:
            return loaded(asked_for(cfg))
        path = require(cfg, "prep", "eval.jsonl") / "eval.jsonl"
        if not (records := list(read_jsonl(path))):
            raise InputError(
                f"bench: {path} has no conversation to ask; set data.eval, raise data.split_eval="
                f"{cfg.data.split_eval}, or name prompts (bench=standard)"
            )
        return BenchSets({"held-out": records}, {"held-out": "held-out"})
    sources = asked_for(cfg)
    why = None
    if own.samples != "shipped":
        try:
            return loaded(sources)
        except InputError as error:
            if own.samples == "hub":
                raise
            why = str(error).partition(" (")[0]
    shipped = {
        name: replace(source, path=str(SHIPPED / f"{name}.jsonl"), skip=0)
        for name, source in sources.items()
        if source.path.startswith("hub:")
    }
    samples = loaded(sources | shipped)
    return replace(samples, origins=samples.origins | dict.fromkeys(shipped, "shipped"), why=why)


def asked_for(cfg: Config) -> dict[str, Source]:
    """The sources of the data sets; {}: the run's held-out conversations."""
    own = cfg.bench
    return {name: own.suite[name] for name in own.only or own.suite} or own.datasets


def prompt_digests(cfg: Config, before: Mapping[str, str]) -> dict[str, str]:
    """What tells the files with the prompts from others of their names, by data set.

    The hub's own and the templates' are known by the source alone. A file that is not here, as
    where only the run's folder was brought, stands for what `before` has of it.

    Args:
        cfg: names the data sets.
        before: what this gave when they were asked.
    """
    held_out = {"held-out": Source(path=str(paths.prompts_dir(cfg) / "eval.jsonl"))}
    digests: dict[str, str] = {}
    for name, source in (asked_for(cfg) or held_out).items():
        key = f"the file of bench data set {name}"
        try:
            files = depends_on(source)
        except InputError:
            digests |= {key: before[key]} if key in before else {}
            continue
        if files:
            text = json.dumps([content_of(file) for file in files])
            digests[key] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def loaded(sources: dict[str, Source]) -> BenchSets:
    """All data sets from their own sources."""
    records = {name: load(source, f"bench data set {name}") for name, source in sources.items()}
    return BenchSets(records, {name: source.path for name, source in sources.items()})
