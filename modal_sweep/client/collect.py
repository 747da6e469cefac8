"""Bringing a job's result here: outputs into its folder, the end into the journal, to Hydra."""

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf, open_dict, read_write

from modal_sweep.client.calls import look
from modal_sweep.client.messages import failure_text
from modal_sweep.client.plan import Job
from modal_sweep.client.volumes import read_if_there, volume
from modal_sweep.errors import JobFailed, ResultGone
from modal_sweep.protocol import outputs, result
from modal_sweep.protocol.journal import JobRecord, Journal
from modal_sweep.protocol.records import write_whole

if TYPE_CHECKING:
    import modal


def output_dir(journal: Journal, record: JobRecord) -> Path:
    """A job's output directory here, also when the sweep directory has moved."""
    return journal.sweep_dir / str(record.plan["subdir"])


def job_folder(journal: Journal, record: JobRecord) -> Path:
    """Where the launcher keeps a job's manifest and log."""
    return journal.folder / f"{record.number}-{record.identity[:8]}"


def saved_at(journal: Journal, record: JobRecord) -> tuple["modal.Volume", str]:
    """The Volume and the folder where a job's container saves."""
    return volume(journal.sweep["volume"]), f"{journal.sweep['id']}/{record.key}"


def note_end(
    journal: Journal, record: JobRecord, envelope: dict[str, Any], unpulled: str | None
) -> None:
    """Note how a job ended, and why its outputs are not here: that is no failure of it."""
    end = {"call": record.call, "status": envelope["status"], "value": shown_value(envelope)}
    for name in ("error", "tail", "seconds", "attempt", "task_name", "working_dir"):
        end[name] = envelope.get(name)
    journal.write([record.event("end", unpulled=unpulled, **end)])


def bring(journal: Journal, record: JobRecord, envelope: dict[str, Any]) -> int:
    """Bring the outputs that an envelope holds or lists; number of files fetched.

    Raises:
        OSError, ValueError: a file could not be brought.
    """
    source, base = saved_at(journal, record)
    folder, fetched, manifest = output_dir(journal, record), 0, None
    if "files" in envelope:
        manifest = {}
        for name, text in envelope["files"].items():
            path, content = outputs.safe_target(folder, name), text.encode("latin-1")
            write_whole(path, [content], durable=False)
            manifest[name] = {"size": len(content), "sha256": outputs.file_digest(path)}
        fetched = len(manifest)
    elif "manifest" in envelope:
        manifest = envelope["manifest"]
        if manifest is None:  # too long for the result
            saved = read_if_there(source, f"{base}/manifest.json")
            if saved is None:
                raise FileNotFoundError(f"{base} has no manifest")
            manifest = json.loads(saved)
        fetched = outputs.pull(
            manifest, folder, lambda name: source.read_file(f"{base}/outputs/{name}")
        )
    if manifest is not None:
        remove_replaced(journal, record, manifest)
        content = json.dumps(manifest, indent=1).encode()
        write_whole(job_folder(journal, record) / "manifest.json", [content])
    if envelope.get("cwd_files"):
        cwd = Path(record.plan["ref"]["cwd"])
        fetched += outputs.pull(
            envelope["cwd_files"], cwd, lambda name: source.read_file(f"{base}/cwd/{name}")
        )
    return fetched


def remove_replaced(journal: Journal, record: JobRecord, manifest: dict[str, Any]) -> None:
    """Remove what jobs before this one have brought into its folder, and it has not written; files
    that were changed here since stay."""
    folder = output_dir(journal, record)
    others = [o for o in journal.ordered() if o.plan["subdir"] == record.plan["subdir"]]
    for other in others:  # under whichever numbers it was asked for
        for brought in journal.folder.glob(f"*-{other.identity[:8]}/manifest.json"):
            for name, entry in json.loads(brought.read_bytes()).items():
                path = outputs.safe_target(folder, name)
                left = name not in manifest and path.is_file()
                if left and outputs.file_digest(path) == entry["sha256"]:
                    path.unlink()


def shown_value(envelope: dict[str, Any]) -> Any:
    """The return value as the journal keeps it: JSON only, and small."""
    packed = envelope.get("value") or {}
    if "json" in packed and len(json.dumps(packed["json"])) < 4096:
        return packed
    return {"other": True} if packed else None


def pull(journal: Journal, record: JobRecord) -> int:
    """Bring what a job has saved and what is not here yet; number of files fetched.

    Raises:
        FileNotFoundError: nothing was saved yet.
        OSError, ValueError: a file could not be brought.
    """
    envelope = saved_result(journal, record) or {"manifest": None}
    fetched = bring(journal, record, envelope)
    if record.end and record.unpulled:
        journal.write([record.end | {"unpulled": None}])
    return fetched


def saved_result(journal: Journal, record: JobRecord) -> dict[str, Any]:
    """The result on the Volume, without what is pickled; empty when there is none."""
    source, base = saved_at(journal, record)
    packed = read_if_there(source, f"{base}/result.bin")
    return {} if packed is None else result.without_pickle(result.unpack(packed))


def log_text(journal: Journal, record: JobRecord) -> str | None:
    """What a job has printed, as it was saved; None when it was not."""
    source, base = saved_at(journal, record)
    saved = read_if_there(source, f"{base}/log.txt")
    if saved is None and (text := saved_result(journal, record).get("log")):
        saved = text.encode("latin-1")
    return None if saved is None else saved.decode(errors="replace")


def job_return(
    job: Job, record: JobRecord, envelope: dict[str, Any] | None, journal: Journal
) -> JobReturn:
    """Hydra's record of a job, as `run_job` would have returned it here.

    Args:
        envelope: of its result, where this process has it.
    """
    config = job.config
    OmegaConf.set_readonly(config, False)
    with read_write(config.hydra), open_dict(config):
        config.hydra.runtime.output_dir = str(output_dir(journal, record).resolve())
        hydra = config.pop("hydra")
    # Composed configurations are large: they are handed over, not copied.
    hydra_cfg = OmegaConf.create({}, flags={"no_deepcopy_set_nodes": True})
    hydra_cfg["hydra"] = hydra
    end = record.end
    assert end is not None
    returned = JobReturn(
        overrides=list(hydra.overrides.task._iter_ex(resolve=False)),
        cfg=config,
        hydra_cfg=hydra_cfg,
        working_dir=end["working_dir"] or os.getcwd(),
        task_name=end["task_name"] or str(hydra.job.name),
    )
    returned.status = JobStatus.FAILED
    if record.broken:
        returned.return_value = JobFailed(failure_text(journal, record))
        return returned
    try:
        returned.return_value = value_of(end, envelope)
        returned.status = JobStatus.COMPLETED
    except JobFailed as error:
        returned.return_value = JobFailed(f"job {record.number}: {error}")
    return returned


def value_of(end: dict[str, Any], envelope: dict[str, Any] | None) -> Any:
    """A completed job's return value; raises JobFailed when it is not to be had any more."""
    packed = end["value"] or {"json": None}
    if "json" not in packed:  # too large for the journal, or no JSON
        with contextlib.suppress(ResultGone):
            envelope = envelope or look(end["call"])
        packed = envelope["value"] if envelope else packed
    return result.unpack_value(packed)
