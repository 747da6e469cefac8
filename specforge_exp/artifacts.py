"""Write-once artifacts: made under `<name>.partial`, renamed, reused when their inputs match.

Beside each lies run.json, which says what made it: command, commit, versions, machine, inputs,
settings; and what it consists of: size and digest of every file. Three laws: an artifact has one
writer at a time; hours of unfinished work are removed by `<stage>.force=true` only; what is read
has been compared with its record.
"""

import errno
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specforge_exp.config import Config
from specforge_exp.config.machine import command
from specforge_exp.errors import FULL, REFUSALS, InputError, naming, number_of
from specforge_exp.lease import lease
from specforge_exp.provenance import code, git_commit, machine, package_versions
from specforge_exp.records import sync, sync_tree, unsealed, write_record

log = logging.getLogger(__name__)

WHOLE = 64 * 2**20
"""Bytes of the largest file whose digest is of all of it."""
BLOCKS, BLOCK = 16, 2**16
"""The digest of a larger file is of so many blocks of so many bytes, evenly spread."""


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
        """What differs from the fingerprint that `record` (a run.json) holds, one line each; an
        option that one of both does not have is null there."""
        changes, given = differing(self.settings, record), record.get("inputs", {})
        for name in {**self.inputs, **given}:
            if another(given.get(name), self.inputs.get(name)):
                gone = name not in self.inputs
                changes.append(f"{name} is not read any more" if gone else f"{name} has changed")
        return changes


def another(one: str | None, other: str | None) -> bool:
    """Whether two digests are of different things; of a hub id as far as both know its files."""
    (name, *files), (same, *others) = (str(digest).split("\n") for digest in (one, other))
    known = dict(file.rsplit(" ", 1) for file in others)
    return name != same or any(known.get(k, v) != v for k, v in (f.rsplit(" ", 1) for f in files))


def differing(
    settings: dict[str, Any], record: dict[str, Any], only: Iterable[str] | None = None
) -> list[str]:
    """What differs from the settings that `record` (a run.json) holds, one line each.

    Args:
        settings: those of now.
        record: what is compared with them.
        only: the settings to compare; None: all that one of both has.
    """
    now, before = json.loads(json.dumps(settings)), record.get("settings", {})
    return [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in ({**now, **before} if only is None else only)
        if before.get(name) != now.get(name)
    ]


def read_object(path: Path, again: str = "remove it and run again") -> dict[str, Any]:
    """What `write_record` or `write_json` wrote; InputError, which ends with the remedy `again`,
    when it cannot be read or is not what was written."""
    try:
        return unsealed(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {again}") from None


def read_record(path: Path, again: str = "remove it and run again") -> dict[str, Any]:
    """The run.json of an artifact; InputError as `read_object`."""
    record = read_object(path, again)
    if "inputs" not in record:
        raise InputError(f"{path} is not a record of a run; {again}")
    return record


def reusable(
    record_file: Path,
    fingerprint: Fingerprint,
    force: bool,
    stage: str,
    again: str | None = None,
) -> bool:
    """True when the artifact is complete, whole and made of the same things.

    Args:
        record_file: the artifact's run.json, or the artifact itself when it is one JSON file.
        fingerprint: what it would be made of now.
        force: make it again in any case.
        stage: the stage's name, for messages.
        again: the option that makes it again; None: <stage>.force=true.

    Raises:
        InputError: it is complete, but something it was made of has changed, or it is damaged.
    """
    again, folder = again or f"{stage}.force=true", record_file.parent
    if not completed(folder, fingerprint) and (force or not record_file.exists()):
        return False
    record = read_record(record_file, f"make it again with {again}")
    changes = fingerprint.changes(record)
    if changes:
        name = f"run_name={record_file.parent.name}{fingerprint.apart(record)}"
        both = name if stage == "train" else "another name (run_name, data.name or model.name)"
        raise InputError(
            f"{folder} is complete, but was made of something else: "
            f"{'; '.join(changes)}. Make it again with {again}, or keep both under {both}"
        )
    if record_file.name == "run.json":
        check(folder, command(stage, again, away=False))
    log.info("%s: complete, reused: %s", stage, folder)
    return True


def contents(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and digest of these files of a folder; of those above WHOLE, the digest of BLOCKS."""
    return {name: content_of(folder / name) for name in names}


def content_of(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file; of a large one, under another key, that of some blocks."""
    size = path.stat().st_size
    if size <= WHOLE:
        return {"bytes": size, "sha256": sha256(path)}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return {"bytes": size, f"sha256 of {BLOCKS} blocks": digest.hexdigest()}


CHECKED: set[tuple[Path, int, int]] = set()
"""Files whose digests this process has compared, by size and time of writing."""


def check(folder: Path, command: str, record: str = "run.json") -> None:
    """Compare a folder with its record: sizes always, digests once per process.

    A folder without a record was made by hand, one of an older version has no `files` in it: both
    are taken as they are.

    Raises:
        InputError: a file is missing or is not what was written; names the command that helps.
    """
    file, remedy = folder / record, f"make it again with: {command}"
    files = read_record(file, remedy).get("files", {}) if file.exists() else {}
    for name, before in files.items():
        path = folder / name
        if not path.exists():
            raise InputError(f"{path} is missing; {remedy}")
        size, time_ns = path.stat().st_size, path.stat().st_mtime_ns
        key = (path.absolute(), size, time_ns)
        if size != before["bytes"] or (key not in CHECKED and content_of(path) != before):
            sizes = f"{size} bytes, was written with {before['bytes']}"
            raise InputError(f"{path} is damaged ({sizes}); {remedy}")
        CHECKED.add(key)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, and what else the system refuses to write, into an InputError that says
    what to do; nothing complete is lost."""
    try:
        yield
    except Exception as error:
        number = number_of(error)
        why, remedy = "the disk is full", "free some space"
        if number == errno.EFBIG:
            why, remedy = "a file is too large for this system", "raise the limit (ulimit -f)"
        elif number in REFUSALS - FULL and not isinstance(error, OSError):  # which name the file
            why, remedy = str(error), "mend that"
        elif number not in FULL:
            raise
        raise InputError(
            f"{why} while writing {path}; {remedy} and run the same command again: complete "
            "artifacts are untouched"
        ) from None


@contextmanager
def writing(
    folder: Path,
    fingerprint: Fingerprint,
    cfg: Config,
    stage: str,
    work: str = "",
    counts: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """Give a folder to write into; when the block ends well it becomes `folder`, with run.json.

    Args:
        folder: the artifact; this process is its only writer.
        fingerprint: what it is made of.
        cfg: recorded in run.json.
        stage: whose artifact it is; its `force` gives up the work of other options.
        work: patterns of files, with spaces, from which an interrupted run of the same fingerprint
            continues: hours of work. Nothing is kept where there are none.
        counts: more of run.json, by key; the block fills it.

    Raises:
        InputError: another process writes the folder, or its unfinished work is of another
            fingerprint.
    """
    started = time.monotonic()
    partial = partial_of(folder)
    with disk_errors(partial), lease(folder):
        begin(partial, fingerprint, vars(vars(cfg)[stage])["force"], stage, work)
        try:
            yield partial
        except InputError:
            if not unfinished(partial, work):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        record = describe(cfg, fingerprint.inputs, fingerprint.settings)
        record |= {"seconds": round(time.monotonic() - started, 1), **(counts or {})}
        files = {path for path in partial.rglob("[!.]*") if path.is_file()}  # no kill's .tmp...
        files -= {partial / "begun.json", *unfinished(partial, f"{work} *.partial")}
        record["files"] = contents(
            partial, sorted(str(path.relative_to(partial)) for path in files)
        )
        write_record(partial / "run.json", record)
        finish(partial, folder)


def partial_of(folder: Path) -> Path:
    """Where an artifact is made."""
    return folder.with_name(folder.name + ".partial")


def unfinished(partial: Path, work: str) -> list[Path]:
    """The files from which an interrupted run continues."""
    return [path for pattern in work.split() for path in partial.glob(pattern)]


def begin(partial: Path, fingerprint: Fingerprint, force: bool, stage: str, work: str) -> None:
    """Make the partial folder, or keep what an interrupted run left there, as `writing` says."""
    begun = partial / "begun.json"
    kept = unfinished(partial, work and f"{work} run.json")
    changes = ["nobody knows with which options it was begun"]
    with suppress(InputError):
        changes = fingerprint.changes(read_record(begun))
    if kept and changes and not force:
        raise InputError(
            f"{partial} holds unfinished work of other options: {'; '.join(changes)}. Finish it "
            f"with those, give it up with {stage}.force=true, or use another data.name or "
            "model.name"
        )
    if changes or not kept:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    write_record(begun, {"inputs": fingerprint.inputs, "settings": fingerprint.settings})


def completed(folder: Path, fingerprint: Fingerprint) -> bool:
    """Finish what was killed after its run.json, and so is whole; False where there is none."""
    partial = partial_of(folder)
    with suppress(InputError):
        if (partial / "run.json").exists():
            with lease(folder):
                if not fingerprint.changes(read_record(partial / "run.json")):
                    finish(partial, folder)
                    return True
    return False


def finish(partial: Path, folder: Path) -> None:
    """Remove all that run.json does not name, and give the folder its name."""
    names = {"run.json", *read_record(partial / "run.json")["files"]}
    for path in sorted(partial.rglob("*"), reverse=True):  # what is inside comes first
        if path.is_file() and str(path.relative_to(partial)) not in names:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
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
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_target(record: dict[str, Any], path: str) -> list[str]:
    """A line that says so where `record` (a run.json) is of another target than this one."""
    theirs = record["inputs"].get("the target")
    changed = theirs is not None and another(theirs, model_digest(path))
    return [f"its target was another than model.path={path} is now"] if changed else []


def model_digest(path: str) -> str:
    """Digest that tells a local model folder from another; for `another` a hub id is followed by
    those of its files in the cache, as far as they are there: one a line.

    Files count as in `content_of`: weights above WHOLE by some of their blocks.
    """
    folder, local = files_of(path), Path(path).is_dir()
    if folder is None:
        return path
    digest, files = hashlib.sha256(), [path]
    words = "" if (folder / "tokenizer.json").exists() else ".txt .tiktoken"  # read without it
    kinds = f".json .jinja .safetensors .bin .model {words}".split()
    for file in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        if file.suffix in kinds:
            name, (size, content) = file.relative_to(folder), content_of(file).values()
            digest.update(f"{name} {size} {content}".encode())
            files.append(f"{name} {content[:16]}")
    return digest.hexdigest() if local else "\n".join(files)


def files_of(path: str) -> Path | None:
    """Where a model's files are on this machine, a folder's or a hub id's; None: nowhere."""
    return Path(path) if Path(path).is_dir() else cached(path)


def cached(path: str) -> Path | None:
    """Where the cache has the files of a hub id; None: nowhere, or it is none."""
    from huggingface_hub import try_to_load_from_cache  # a record is read without

    with suppress(ValueError):
        found = try_to_load_from_cache(path, "config.json")
        return Path(found).parent if isinstance(found, str) else None
    return None


def describe(cfg: Config, inputs: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json except for the seconds it took."""
    return {
        "command": " ".join(sys.argv),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_commit(),
        "code": code(cfg),
        "packages": package_versions(),
        "machine": machine(cfg.device),
        "inputs": inputs,
        "settings": settings,
        "config": asdict(cfg),
    }
