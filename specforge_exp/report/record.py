"""A sweep's record, sweep.json: which runs it has, where their folders are, benching them all."""

import gc
import glob
import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from specforge_exp import paths
from specforge_exp.artifacts import read_record
from specforge_exp.config import Config, draft_config_class, from_omegaconf
from specforge_exp.errors import InputError

log = logging.getLogger(__name__)

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


def no_sweep(wanted: Path, root: Path) -> str:
    """What to say about a folder without a sweep.json."""
    found = [str(file.parent) for file in sorted(root.glob(f"**/{FILE}"))]
    there = "; there are: " + ", ".join(found) if found else f"; there is none below {root}"
    return f"{wanted} holds no {FILE}, which python train.py -m ... writes{there}"


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


def bench_all(
    cfg: Config, export: Callable[[Config], object], bench: Callable[[Config], float]
) -> float:
    """Bench the run of `cfg`, or with `sweep` export and bench every finished run of that sweep.

    A run of a sweep keeps its own configuration; bench, export, device and threads are `cfg`'s.

    Args:
        cfg: the command line's configuration.
        export: the stage.
        bench: the stage.

    Returns:
        The run's accepted length, averaged over the data sets; a sweep's best one.

    Raises:
        InputError: there is no such sweep, no run of it is finished, or some could not be benched:
            the others are, and the message has the reasons.
    """
    if cfg.sweep is None:
        return bench(cfg)
    sweep_dir = find_sweep(cfg.sweep, cfg.paths.checkpoints)
    sweep = read_sweep(sweep_dir)
    if sweep.get("script") != "train":
        raise InputError(f"{sweep_dir} is a sweep of {sweep.get('script')}.py, not of train.py")
    runs = [run for run in sweep["runs"] if run["status"] == "completed"]
    unfinished = len(sweep["runs"]) - len(runs)
    if unfinished:
        log.info("bench: %d of %d runs are not finished", unfinished, len(sweep["runs"]))
    if not runs:
        raise InputError(f"no run of {sweep_dir} is finished; go on with: {sweep.get('command')}")
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        name = run["name"]
        log.info("%d/%d %s", number, len(runs), name)
        try:
            own = config_of(cfg, sweep_dir, sweep, run)
            export(own)
            bench(own)
            results[name] = json.loads(paths.bench_file(own).read_text())
        except InputError as error:
            failed[name] = str(error)
        except Exception as error:  # the other runs are worth their time all the same
            log.exception("%s", name)
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
        gc.collect()  # the next run loads its own target
    if results:
        print(ranking(results))
        log.info("all about them: python report.py sweep=%s", shlex.quote(str(sweep_dir)))
    if failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise InputError(f"{len(failed)} of {len(runs)} runs could not be benched:{reasons}")
    return max(float(result["average"]) for result in results.values())


def config_of(cfg: Config, sweep_dir: Path, sweep: dict[str, Any], run: dict[str, Any]) -> Config:
    """The configuration a run was made with, for the stages after it and with `cfg`'s options.

    Raises:
        InputError: the run is not here, or was made with options that this version does not have.
    """
    folder = run_folder(sweep_dir, sweep, run)
    if folder is None or not (folder / "run.json").exists():
        raise InputError(
            f"its folder is not here; if it ran on Modal: modal-sweep pull --checkpoints "
            f"{shlex.quote(str(sweep_dir))}; if not, make it with: {run.get('command')}"
        )
    made = read_record(folder / "run.json").get("config")
    if not isinstance(made, dict):
        raise InputError(f"{folder / 'run.json'} has no configuration; train the run again")
    try:
        options = {field.name for field in fields(draft_config_class(made["draft"]["_target_"]))}
        # An older version kept the options of every kind of draft.
        made["draft"] = {key: made["draft"][key] for key in made["draft"] if key in options}
        own = from_omegaconf(OmegaConf.create(made))
    except InputError as error:
        raise InputError(
            f"{folder / 'run.json'} was written by another version, whose options do not fit "
            f"({error}); bench it with the commit it names, or train it again"
        ) from None
    own.bench, own.export, own.device, own.threads = cfg.bench, cfg.export, cfg.device, cfg.threads
    own.run_name, own.paths.checkpoints = folder.name, str(folder.parent)
    datasets = Path(sweep.get("cwd") or ".") / own.paths.datasets
    own.paths.datasets = str(datasets) if datasets.is_dir() else cfg.paths.datasets
    if own.model.name == cfg.model.name:  # where this machine has it
        own.model.path = cfg.model.path
    return own


def ranking(results: dict[str, dict[str, Any]]) -> str:
    """The runs' accepted lengths as a table, best first."""
    best_first = sorted(results, key=lambda name: -results[name]["average"])
    sets = list(dict.fromkeys(name for result in results.values() for name in result["datasets"]))
    width = max(len("run"), *map(len, results))
    lines = [f"{'run':{width}} {'tau':>6} " + " ".join(f"{name:>12}" for name in sets)]
    for name in best_first:
        found = results[name]["datasets"]
        cells = [f"{found[s]['accepted_length']:.2f}" if s in found else "-" for s in sets]
        lossy = [s for s in found if found[s]["lossless"] is False]
        lines.append(
            f"{name:{width}} {results[name]['average']:6.2f} "
            + " ".join(f"{cell:>12}" for cell in cells)
            + (f"  NOT LOSSLESS: {', '.join(lossy)}" if lossy else "")
        )
    return "\n".join(lines)
