"""Write-once artifacts: made under `<name>.partial`, renamed, reused when their inputs match."""

import errno
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.provenance import describe, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fingerprint:
    """What an artifact depends on. Equal fingerprints mean: the same artifact."""

    inputs: dict[str, str]
    """Digest of every input, by a name that a user recognises."""
    settings: dict[str, Any]
    """The options that matter, by their key in the configuration."""

    def changes(self, record: dict[str, Any]) -> list[str]:
        """What differs from the fingerprint that `record` (a run.json) holds, one line each."""
        found = []
        for name, now in json.loads(json.dumps(self.settings)).items():
            before = record.get("settings", {}).get(name)
            if before != now:
                found.append(f"{name} was {before}, now {now}")
        for name, now in self.inputs.items():
            if record.get("inputs", {}).get(name) != now:
                found.append(f"{name} has changed")
        return found


def read_record(path: Path) -> dict[str, Any]:
    """The run.json of an artifact; InputError when it cannot be read."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and run again") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} is not a record of a run; remove it and run again")
    return record


def reusable(
    record_file: Path,
    fingerprint: Fingerprint,
    force: bool,
    stage: str,
    again: str | None = None,
) -> bool:
    """True when the artifact is complete and made of the same things.

    Args:
        record_file: the artifact's run.json, or the artifact itself when it is one JSON file.
        fingerprint: what it would be made of now.
        force: make it again in any case.
        stage: the stage's name, for messages.
        again: the option that makes it again; None: <stage>.force=true.

    Raises:
        InputError: it is complete, but something it was made of has changed.
    """
    if force or not record_file.exists():
        return False
    changes = fingerprint.changes(read_record(record_file))
    if changes:
        raise InputError(
            f"{record_file.parent} is complete, but was made of something else: "
            f"{'; '.join(changes)}. Make it again with {again or stage + '.force=true'}, or keep "
            "both under another name (run_name, data.name or model.name)"
        )
    log.info("%s: complete, reused: %s", stage, record_file.parent)
    return True


def require(path: Path, command: str) -> Path:
    """`path`, or an InputError that names the command which makes it."""
    if not path.exists():
        raise InputError(f"{path} does not exist; make it with: {command}")
    return path


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into an InputError that says what to do; nothing complete is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"the disk is full while writing {path}; free some space and run the same command "
            "again: complete artifacts are untouched"
        ) from None


@contextmanager
def writing(
    folder: Path, fingerprint: Fingerprint, cfg: Config, resume: bool = False
) -> Iterator[Path]:
    """Give a folder to write into; when the block ends well it becomes `folder`, with run.json.

    Args:
        folder: the artifact.
        fingerprint: what it is made of; a partial folder of the same fingerprint may be resumed.
        cfg: recorded in run.json.
        resume: keep what an interrupted run of the same fingerprint left in the partial folder.
    """
    started = time.monotonic()
    partial = folder.with_name(folder.name + ".partial")
    begun = partial / "begun.json"
    with disk_errors(partial):
        if not (resume and begun.exists() and not fingerprint.changes(read_record(begun))):
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        write_json(begun, {"inputs": fingerprint.inputs, "settings": fingerprint.settings})
        yield partial
        record = describe(cfg, fingerprint.inputs, fingerprint.settings)
        record["seconds"] = round(time.monotonic() - started, 1)
        write_json(partial / "run.json", record)
        begun.unlink()
        replace_folder(partial, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Move `new` to `folder`; an older `folder` is moved aside first and removed last."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
