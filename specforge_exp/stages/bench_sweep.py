"""bench of a whole sweep: export and bench every finished run.

Reads <sweep>/sweep.json and the runs' folders; writes what export and bench write, and prints one
table. It is the one stage that imports others: what it adds is their order, over runs.
"""

import gc
import logging
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from specforge_exp import paths
from specforge_exp.artifacts import read_record
from specforge_exp.config import Config, from_omegaconf
from specforge_exp.config.machine import SAME, script
from specforge_exp.errors import InputError, first_line
from specforge_exp.report.origin import run_folder
from specforge_exp.report.record import find_sweep, read_sweep
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export

log = logging.getLogger(__name__)


def bench_sweep(cfg: Config) -> float:
    """Bench the run of `cfg`, or with `sweep` export and bench every finished run of that sweep.

    A run of a sweep keeps its own configuration; bench, export, engine, device and threads are
    `cfg`'s.

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
            results[name] = read_record(paths.bench_file(own))
        except InputError as error:
            failed[name] = str(error).replace(SAME, f"(with the options of: {run.get('command')})")
        except Exception as error:  # the other runs are worth their time all the same
            log.exception("%s", name)
            failed[name] = first_line(error)
        gc.collect()  # the next run loads its own target
    if results:
        print(ranking(results))
        log.info("all about them: %s sweep=%s", script("report"), shlex.quote(str(sweep_dir)))
    if failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise InputError(f"{len(failed)} of {len(runs)} runs could not be benched:{reasons}")
    return max(float(result["average"]) for result in results.values())


def config_of(cfg: Config, sweep_dir: Path, sweep: dict[str, Any], run: dict[str, Any]) -> Config:
    """The configuration a run was made with, for the stages after it and with `cfg`'s options.

    Raises:
        InputError: the run is not here, or what is here is another's, or was made with options that
            this version does not have, or its draft cannot do what bench's options say.
    """
    folder, strange = run_folder(sweep_dir, sweep, run)
    made_of = folder and [*folder.glob("step-*[0-9]"), *folder.glob("export/run.json")]
    if folder is None or not (made_of and (folder / "run.json").exists()):
        missing = f"{folder} holds no checkpoint" if folder else "its folder is not here"
        raise InputError(
            f"{'; '.join(strange) or missing}; if it ran on Modal: modal-sweep pull --checkpoints "
            f"{shlex.quote(str(sweep_dir))}; if not, make it with: {run.get('command')}"
            + " trainer.resume=false"
            * bool(folder or strange)
        )
    record = read_record(folder / "run.json")
    made = record.get("config")
    if not isinstance(made, dict):
        raise InputError(f"{folder / 'run.json'} has no configuration; train the run again")
    try:
        own = from_omegaconf(OmegaConf.create(made))
    except InputError as error:
        raise InputError(
            f"{folder / 'run.json'} was written by another version, whose options do not fit "
            f"({error}); bench it with the commit that made it ({record.get('git')}), or train it "
            f"again with: {run.get('command')} trainer.resume=false"
        ) from None
    for name in ("bench", "export", "engine", "device", "threads"):
        setattr(own, name, getattr(cfg, name))
    own.__post_init__()
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
        figures = results[name]["datasets"]
        cells = [f"{figures[s]['accepted_length']:.2f}" if s in figures else "-" for s in sets]
        lossy = [s for s in figures if figures[s]["lossless"] is False]
        lines.append(
            f"{name:{width}} {results[name]['average']:6.2f} "
            + " ".join(f"{cell:>12}" for cell in cells)
            + (f"  NOT LOSSLESS: {', '.join(lossy)}" if lossy else "")
        )
    files = [f"the file of bench data set {name}" for name in sets]
    asked = {tuple(map(result["inputs"].get, files)) for result in results.values()}
    if len(asked) > 1:
        lines.append("NOT COMPARABLE: not all were asked the same prompts; bench=standard does")
    return "\n".join(lines)
