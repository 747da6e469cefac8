"""Write-once artifacts: made under `<name>.partial`, renamed, reused when their inputs match.

Beside each lies run.json, which says what made it: command, commit, versions, inputs, settings.
"""

import errno
import hashlib
import json
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specforge_exp.config import REPOSITORY, Config
from specforge_exp.errors import InputError
from specforge_exp.records import sync, sync_tree, write_json

log = logging.getLogger(__name__)

PACKAGES = "torch transformers tokenizers safetensors hydra-core omegaconf numpy".split()


@dataclass(frozen=True)
class Fingerprint:
    """What an artifact depends on. Equal fingerprints mean: the same artifact."""

    inputs: dict[str, str]
    """Digest of every input, by a name that a user recognises."""
    settings: dict[str, Any]
    """The options that matter, by their key in the configuration."""

    def apart(self, record: dict[str, Any]) -> str:
        """What tells this from the artifact of `record` when it is added to a name."""
        held, plain = record.get("settings", {}), (str, int, float)
        new = {k: v for k, v in self.settings.items() if held.get(k) != v and isinstance(v, plain)}
        return "".join(f"_{key.rpartition('.')[-1]}{new[key]}" for key in [*new][:3]) or "_2"

    def changes(self, record: dict[str, Any]) -> list[str]:
        """What differs from the fingerprint that `record` (a run.json) holds, one line each."""
        changes = []
        for name, now in json.loads(json.dumps(self.settings)).items():
            before = record.get("settings", {}).get(name)
            if before != now:
                changes.append(f"{name} was {before}, now {now}")
        for name, now in self.inputs.items():
            if record.get("inputs", {}).get(name) != now:
                changes.append(f"{name} has changed")
        return changes


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
    record = read_record(record_file)
    changes = fingerprint.changes(record)
    if changes:
        name = f"run_name={record_file.parent.name}{fingerprint.apart(record)}"
        both = name if stage == "train" else "another name (run_name, data.name or model.name)"
        raise InputError(
            f"{record_file.parent} is complete, but was made of something else: "
            f"{'; '.join(changes)}. Make it again with {again or stage + '.force=true'}, or keep "
            f"both under {both}"
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
        sync_tree(partial)
        replace_folder(partial, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Move `new` to `folder`; an older `folder` is moved aside first and removed last."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(path: str) -> str:
    """Digest that tells a local model folder from another; a hub id stands for itself.

    Weights count by name and size, small files (config, tokenizer) by content.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".jinja", ".safetensors"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            digest.update(sha256(file).encode() if size < 64 * 2**20 else b"")
    return digest.hexdigest()


def git_commit() -> str | None:
    """Commit of the working tree, marked -dirty when it differs; None outside git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def describe(cfg: Config, inputs: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json except for the seconds it took."""
    return {
        "command": " ".join(sys.argv),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_commit(),
        "packages": package_versions(),
        "inputs": inputs,
        "settings": settings,
        "config": asdict(cfg),
    }
