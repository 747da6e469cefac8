"""Which engines hand the states of a target to a draft, as their sources say.

`engines.json` is made of those by `tests/engine_targets.py`: `only` has all targets that an engine
reads for such drafts, `not` those of its own that it does not (any other it runs by transformers).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from specforge_exp.config import Config
from specforge_exp.target.files import model_config


@cache
def engines() -> list[dict[str, Any]]:
    """The entries of engines.json."""
    entries: list[dict[str, Any]] = json.loads(Path(__file__).with_name("engines.json").read_text())
    return entries


def serving(draft: str, architecture: str) -> list[str]:
    """The engines that serve a draft of this name with targets of a class of transformers."""
    return [
        entry["engine"]
        for entry in engines()
        if draft in entry["drafts"]
        and (architecture in entry["only"] if "only" in entry else architecture not in entry["not"])
    ]


def unserved(cfg: Config) -> str | None:
    """What is to be said of a draft that no engine which is known to serve its kind will serve with
    this target; None where one does, or nobody knows."""
    known = [entry["engine"] for entry in engines() if cfg.draft.name in entry["drafts"]]
    for architecture in (model_config(cfg.model).architectures or [])[:1]:
        if known and not serving(cfg.draft.name, architecture):
            return (
                f"{' and '.join(known)} have no draft={cfg.draft.name} for targets of "
                f"{architecture}, so this one can be measured here and not be served (vLLM's "
                "--model-impl=transformers may); docs/targets.md has which engine serves what, and "
                "draft=standalone asks nothing of the target"
            )
    return None
