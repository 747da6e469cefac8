"""The prompts that bench asks, and where they come from."""

from dataclasses import dataclass, replace
from typing import Any

from specforge_exp.config import REPOSITORY, Config, Source
from specforge_exp.data.conversations import read_jsonl
from specforge_exp.data.sources import load
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
            return loaded(own.datasets)
        path = require(cfg, "prep", "eval.jsonl") / "eval.jsonl"
        return BenchSets({"held-out": list(read_jsonl(path))}, {"held-out": "held-out"})
    sources = {name: own.suite[name] for name in own.only or own.suite}
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


def loaded(sources: dict[str, Source]) -> BenchSets:
    """All data sets from their own sources."""
    records = {name: load(source, f"bench data set {name}") for name, source in sources.items()}
    return BenchSets(records, {name: source.path for name, source in sources.items()})
