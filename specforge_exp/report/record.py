"""A sweep's record, sweep.json: which runs it has and where their folders are."""

import glob
import json
from pathlib import Path
from typing import Any

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
    return f"{folder} holds no {FILE}, which python train.py -m ... writes{there}"


def run_folder(sweep_dir: Path, sweep: dict[str, Any], run: dict[str, Any]) -> Path | None:
    """Folder of one run: the first place with its run.json, else with its metrics; None: not here.

    Places: what the run recorded as run_dir, relative to where the sweep was started; beside
    the folder `sweeps` in which the sweep lies; in the sweep itself; where `modal-sweep pull
    --checkpoints` puts it.

    Args:
        sweep_dir: where sweep.json lies.
        sweep: its content.
        run: one of its runs.
    """
    record = run.get("record") or {}
    name = str(record.get("run_name") or run["name"])
    places: list[Path] = []
    if record.get("run_dir"):
        places.append(Path(sweep.get("cwd") or ".") / record["run_dir"])
    resolved = sweep_dir.resolve()
    if resolved.parent.parent.name == "sweeps":
        places.append(resolved.parent.parent.parent / name)
    places.append(sweep_dir / run["name"])
    places += sorted((sweep_dir / "modal").rglob(glob.escape(Path(name).name)))
    for file in ("run.json", "metrics.jsonl"):
        for place in places:
            if (place / file).is_file():
                return place
    return None
