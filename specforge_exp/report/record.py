"""A sweep's record, sweep.json: which runs it has and where their folders are."""

import json
import math
from pathlib import Path
from typing import Any

from specforge_exp.config.machine import script
from specforge_exp.errors import InputError

FILE = "sweep.json"
VERSION = 1


def find_sweep(sweep: str, checkpoints: str) -> Path:
    """The folder with the sweep.json that `sweep=` names.

    Args:
        sweep: that folder, the one above it, its sweep.json, or a name below `checkpoints`/sweeps.
        checkpoints: paths.checkpoints.

    Raises:
        InputError: there is none; lists those that exist.
    """
    for named in (Path(sweep), Path(checkpoints) / "sweeps" / sweep):
        for folder in (named, named / "train", named.parent):
            if (folder / FILE).is_file() and (folder != named.parent or named.name == FILE):
                return folder
        below = sorted(named.glob(f"*/{FILE}")) if named.is_dir() else []
        if len(below) == 1:
            return below[0].parent
        if below:
            raise InputError(
                f"sweep={sweep} holds several; name one: {', '.join(str(f.parent) for f in below)}"
            )
    raise InputError(no_sweep(Path(sweep), Path(checkpoints) / "sweeps"))


def read_sweep(sweep_dir: Path) -> dict[str, Any]:
    """The content of `sweep_dir`/sweep.json.

    Raises:
        InputError: it is missing (the message lists the sweeps that exist), cannot be read, or was
            written by another version.
    """
    file = sweep_dir / FILE
    if not file.is_file():
        above = next((path for path in sweep_dir.parents if path.name == "sweeps"), None)
        raise InputError(no_sweep(sweep_dir, above or sweep_dir.parent))
    try:
        sweep = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); run the sweep again") from None
    if not (isinstance(sweep, dict) and isinstance(sweep.get("runs"), list)):
        raise InputError(f"{file} is not the record of a sweep; run the sweep again")
    if sweep.get("version") != VERSION:
        raise InputError(
            f"{file} is of version {sweep.get('version')}, this code reads version {VERSION}; run "
            "the sweep again with this code, or read it with the code that made it"
        )
    return sweep


def no_sweep(folder: Path, root: Path) -> str:
    """What to say about a folder without a sweep.json."""
    sweeps = [str(file.parent) for file in sorted(root.glob(f"**/{FILE}"))]
    there = "; there are: " + ", ".join(sweeps) if sweeps else f"; there is none below {root}"
    return f"{folder} holds no {FILE}, which {script('train')} -m ... writes{there}"


def directions(sweep: dict[str, Any]) -> dict[str, str]:
    """minimize or maximize, by objective, in the order in which runs return them."""
    return {
        str(objective["name"]): str(objective.get("direction", "maximize"))
        for objective in sweep.get("objectives") or []
        if isinstance(objective, dict) and "name" in objective
    }


def returned_values(sweep: dict[str, Any], run: dict[str, Any]) -> dict[str, float]:
    """The finite numbers that a run returned, by objective."""
    value = run.get("value")
    values = value if isinstance(value, list) else [value]
    return numbers(dict(zip(directions(sweep), values, strict=False)))


def number(value: Any) -> float | None:
    """A finite number, or None."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if numeric and math.isfinite(value) else None


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """What is a finite number, by its key."""
    return {key: finite for key, value in values.items() if (finite := number(value)) is not None}
