"""What two folders of artifacts have in common, without times, versions and command lines."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

LOGS = {".log", ".lock", ".lease"}
CIRCUMSTANCES = re.compile(
    r"(run|bench)\.json:/(command|config|finished|git|packages|seconds)\b"
    r"|/files/metrics\.jsonl/"  # it has times
)
Leaves = dict[str, object]


def leaves(value: Any, path: str = "") -> Leaves:
    """The scalars of a JSON value by their place."""
    if isinstance(value, dict):
        items = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list):
        items = [(str(number), entry) for number, entry in enumerate(value)]
    else:
        return {path: value}
    return {
        place: leaf
        for key, entry in items
        for place, leaf in leaves(entry, f"{path}/{key}").items()
    }


def file_content(path: Path) -> Leaves:
    """The leaves of a JSON or JSON-lines file; of any other file its digest."""
    try:
        if path.suffix == ".json":
            return leaves(json.loads(path.read_text()))
        if path.suffix == ".jsonl":
            return leaves([json.loads(line) for line in path.read_text().splitlines()])
    except ValueError:
        pass
    return {"": hashlib.sha256(path.read_bytes()).hexdigest()}


def contents(root: Path, places: list[Path]) -> Leaves:
    """All leaves of the files at or below `places`, by file and place.

    Logs are left out, and what a record says of its command.
    """
    result: Leaves = {}
    for place in places:
        for path in sorted([place] if place.is_file() else place.rglob("*")):
            name = path.relative_to(root)
            if path.is_file() and path.suffix not in LOGS and ".hydra" not in name.parts:
                for key, leaf in file_content(path).items():
                    result[f"{name}:{key}"] = leaf
    return {place: leaf for place, leaf in result.items() if not CIRCUMSTANCES.search(place)}


def differences(one: Leaves, other: Leaves) -> set[str]:
    """Places whose leaves differ, or that only one has."""
    missing = object()
    return {key for key in {*one, *other} if one.get(key, missing) != other.get(key, missing)}
