"""Whether what lies in a folder is of the run that it is shown for.

A name proves nothing: a job on Modal and a finished run here may share one, and so do two trainings
one after the other. The law: a folder is a run's when it was made with the options of the job and
holds the value that the job returned, and a measurement is a run's when it measured a draft of that
folder. Whatever contradicts is left out, with the reason.
"""

import glob
import json
import math
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from specforge_exp import paths
from specforge_exp.artifacts import read_record, sha256
from specforge_exp.config import from_omegaconf
from specforge_exp.config.settings import training_settings
from specforge_exp.errors import InputError
from specforge_exp.report.record import returned_values

MARKS = ("step-*[0-9]", "run.json", "metrics.jsonl")
"""What a run's folder may hold, the most telling first."""


def run_folder(
    sweep_dir: Path, sweep: dict[str, Any], run: dict[str, Any]
) -> tuple[Path | None, list[str]]:
    """Folder of one run, and why others of its name are not it; None: not here.

    The sweep's own folders come first: the job's and where `modal-sweep pull --checkpoints` puts
    the rest of it; then what the run recorded as run_dir, relative to where the sweep was started,
    and the same beside the folder `sweeps` in which the sweep lies. Of several the one that holds
    more: a checkpoint, the record, the metrics.

    Args:
        sweep_dir: where sweep.json lies.
        sweep: its content.
        run: one of its runs.
    """
    record = run.get("record") or {}
    name = str(record.get("run_name") or run["name"])
    own = [sweep_dir / run["name"]]
    own += sorted((sweep_dir / "modal").rglob(glob.escape(Path(name).name)))
    here: list[Path] = []
    if record.get("run_dir"):
        here.append(Path(sweep.get("cwd") or ".") / record["run_dir"])
    resolved = sweep_dir.resolve()
    if resolved.parent.parent.name == "sweeps":
        here.append(resolved.parent.parent.parent / name)
    strange: dict[Path, str | None] = {}
    for places in (own, here):
        for mark, place in product(MARKS, places):
            if not any(place.glob(mark)):
                continue
            if place not in strange:
                try:
                    strange[place] = stranger(sweep_dir, sweep, run, place)
                except InputError as error:
                    strange[place] = str(error)
            if strange[place] is None:
                return place, []
    return None, [f"{place} is not of this run: {reason}" for place, reason in strange.items()]


def stranger(
    sweep_dir: Path, sweep: dict[str, Any], run: dict[str, Any], folder: Path
) -> str | None:
    """Why what a folder holds is not of a run; None: nothing speaks against it.

    The options of the job are those that Hydra kept in its folder, unless another command did.

    Raises:
        InputError: nothing in it says so, for its record is damaged.
    """
    script = str(sweep.get("script") or "train")
    if script != "train":  # it names the run that it reads, and has no options of a training
        return None
    made, kept = record_of(folder), sweep_dir / run["name"] / ".hydra" / script
    options = job_options(kept, run)
    if options and "settings" in made:
        tokens = next((name for name in made["inputs"] if name.endswith(".tokens")), None)
        held = made["settings"] | {"tokens": tokens}
        for name, value in json.loads(json.dumps(options)).items():
            if name in held and held[name] != value:
                return f"it was made with {name}={held[name]}, the job with {value}"
    own, returned = folder.is_relative_to(sweep_dir), returned_values(sweep, run)
    if "evaluation" in made or not own:  # else all that it has are metrics
        evaluation = made.get("evaluation") or {}
        for name in returned.keys() - {"gpu_hours"}:
            there = evaluation.get(name)
            if there is None and (folder / "run.json").exists():
                read_record(folder / "run.json")
            if there is None or not math.isclose(there, returned[name], rel_tol=1e-9):
                return f"its {name} is {there}, the job returned {returned[name]}"
    if not (returned or options) and (kept.is_dir() or (sweep_dir / "modal").is_dir() > own):
        return "nothing in it says that it is of this job"
    return None


def record_of(folder: Path) -> dict[str, Any]:
    """What says how a run was made: run.json, else the newest checkpoint's; {}: nothing that can be
    read does."""
    states = sorted(folder.glob("step-*[0-9]/state.json"), reverse=True)
    for file in (folder / "run.json", *states):
        with suppress(InputError):
            return read_record(file)
    return {}


def job_options(kept: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of a training by the configuration that Hydra kept; None: of another job, not here,
    with options that this version does not have, or that the job's environment may have given."""
    own = [text for text in run.get("overrides") or [] if not text.startswith("hydra")]
    try:
        typed = cast(list[str], OmegaConf.to_container(OmegaConf.load(kept / "overrides.yaml")))
        if sorted(typed) != sorted(own) or any("${oc.env:" in text for text in typed):
            return None
        cfg = from_omegaconf(cast(DictConfig, OmegaConf.load(kept / "config.yaml")))
    except (OSError, ValueError, InputError):
        return None
    return training_settings(cfg) | {"tokens": paths.tokens_dir(cfg).name}


def strange_bench(folder: Path, bench: dict[str, Any], returned: float | None) -> str | None:
    """Why a measurement is not of the draft in a run's folder, or not the one that was returned."""
    inputs, export = bench.get("inputs", {}), folder / "export" / "run.json"
    if returned not in (None, bench.get("average")):
        return f"its accepted length is {bench.get('average')}, the job returned {returned}"
    if export.is_file() and inputs.get("the export") not in (None, sha256(export)):
        return "it measured another export than the one beside it"
    steps = [read_record(file) for file in folder.glob("step-*[0-9]/state.json")]
    drafts = [step["draft"] for step in steps if "draft" in step]
    if drafts and inputs.get("the draft") not in drafts:
        return "it measured a draft of a checkpoint that is gone"
    return None
