"""Bringing a job's result here: outputs into the sweep directory, the end into the journal."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_plugins.modal_launcher import _app, _outputs, _result
from hydra_plugins.modal_launcher._calls import Ended
from hydra_plugins.modal_launcher._journal import JobRecord, Journal

if TYPE_CHECKING:
    import modal


def output_dir(journal: Journal, record: JobRecord) -> Path:
    """A job's output directory here, also when the sweep directory has moved."""
    return journal.sweep_dir / str(record.plan["subdir"])


def job_folder(journal: Journal, record: JobRecord) -> Path:
    """Where the launcher keeps a job's manifest and log."""
    return journal.folder / f"{record.number}-{record.identity[:8]}"


def collect(journal: Journal, record: JobRecord, ended: Ended) -> None:
    """Bring a job's outputs here, then note its end.

    Raises:
        OSError: when a file could not be brought; nothing is noted, so it is tried again.
    """
    envelope = ended.envelope
    volume = _app.volume(journal.sweep["volume"])
    base = f"{journal.sweep['id']}/{record.key}"
    folder = output_dir(journal, record)
    if envelope.get("files") is not None:
        for name, held in envelope["files"].items():
            _outputs.write(folder, name, [_result.to_bytes(held)])
    elif "manifest" in envelope:
        pull(volume, base, "outputs", envelope["manifest"], folder)
    if envelope.get("cwd_files"):
        cwd = Path(record.plan["ref"]["cwd"])
        _outputs.pull(envelope["cwd_files"], cwd, reader(volume, f"{base}/cwd"))
    keep_manifest(journal, record, envelope)
    journal.write(
        [
            {
                "event": "end",
                "identity": record.identity,
                "generation": record.generation,
                "call": record.call,
                "status": envelope["status"],
                "value": shown_value(envelope),
                "error": envelope.get("error"),
                "tail": envelope.get("tail"),
                "seconds": envelope.get("seconds"),
                "attempt": envelope.get("attempt"),
                "task_name": envelope.get("task_name"),
                "working_dir": envelope.get("working_dir"),
            }
        ]
    )


def shown_value(envelope: dict[str, Any]) -> Any:
    """The return value as the journal keeps it: JSON only, and small."""
    held = envelope.get("value") or {}
    if "json" in held and len(json.dumps(held["json"])) < 4096:
        return {"json": held["json"]}
    return {"other": True} if held else None


def pull(
    volume: "modal.Volume",
    base: str,
    part: str,
    manifest: dict[str, Any] | None,
    folder: Path,
    progress: Callable[[int], None] = lambda size: None,
) -> int:
    """Bring the files of a job that are not here yet; number of files fetched."""
    if manifest is None:
        raw = b"".join(volume.read_file(f"{base}/manifest.json"))
        manifest = json.loads(raw)
    assert manifest is not None
    return _outputs.pull(manifest, folder, reader(volume, f"{base}/{part}"), progress)


def reader(volume: "modal.Volume", base: str) -> Callable[[str], Iterable[bytes]]:
    """Reads files below a folder of a Volume."""
    return lambda name: volume.read_file(f"{base}/{name}")


def keep_manifest(journal: Journal, record: JobRecord, envelope: dict[str, Any]) -> None:
    """Write down which files belong to a job."""
    if envelope.get("manifest") is not None:
        content = json.dumps(envelope["manifest"], indent=1).encode()
        _outputs.write(job_folder(journal, record), "manifest.json", [content])
