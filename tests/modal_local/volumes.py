"""Volumes with Modal's commit and reload, on plain folders.

Each container works on a copy. `commit` publishes what changed since the last commit or reload
(last writer wins, per file) and `reload` pulls what others committed, so a program that forgets
either fails here as it does on Modal.

A volume keeps a log of its changes. A reload therefore costs as much as there is to pull, and the
copy of a container that ended cleanly is handed to the next one, which pulls the difference only.
A commit has to look at every file of the copy, since a file may be rewritten in place, but reads
only those whose size, times or inode changed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections import OrderedDict
from pathlib import Path

BLOCK = 8 * 1024 * 1024  # of a version 2 volume

TEMPORARY = ".~modal-local"
MAX_SPARES = 4
Signature = tuple[int, ...]
FOLDER: Signature = ()
_authors = itertools.count(1)


class VolumeFullError(OSError):
    """The volume takes no more data."""


def scan(root: str) -> dict[str, Signature]:
    """Return what tells a changed file from an unchanged one, for every path below `root`."""
    found: dict[str, Signature] = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            entries = os.scandir(os.path.join(root, folder))
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                if entry.name.endswith(TEMPORARY):
                    continue
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    found[relative] = FOLDER
                    pending.append(relative)
                    continue
                signature = _signature(entry.path)
                if signature is not None:
                    found[relative] = signature
    return found


def _signature(path: str | Path) -> Signature | None:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Make `target` what `source` is now: a file, a link, an empty folder or nothing."""
    if source.is_dir() and not source.is_symlink():
        if target.is_symlink() or target.is_file():
            target.unlink()
        target.mkdir(parents=True, exist_ok=True)
        return
    temporary = target.with_name(target.name + TEMPORARY)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copy2(source, temporary, follow_symlinks=False)
    except FileNotFoundError:
        temporary.unlink(missing_ok=True)
        if not source.is_symlink():
            _remove(target)
        return
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    temporary.replace(target)


class Volume:
    """The committed content of a volume."""

    def __init__(self, id: str, name: str, version: int, root: Path) -> None:
        self.id, self.name, self.version, self.root = id, name, version, root
        self.created = time.time()
        self.full = False
        self.lock = threading.Lock()
        self.number = 0  # of the last change
        self.log: OrderedDict[str, tuple[int, int]] = OrderedDict()  # path -> (number, author)
        self.spares: list[Checkout] = []
        root.mkdir(parents=True, exist_ok=True)
        for path in sorted(scan(str(root))):
            self.note(path)

    def path(self, relative: str) -> Path:
        """Return where a path of the volume lies on the host; refuse one that leaves the volume."""
        root = self.root.resolve()
        path = (root / relative.lstrip("/")).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"path escapes the volume: {relative}")
        return path

    def note(self, relative: str, author: int = 0) -> None:
        """Record that a path changed."""
        self.number += 1
        self.log.pop(relative, None)
        self.log[relative] = (self.number, author)

    def check_space(self) -> None:
        """Refuse to take data while the volume is full."""
        if self.full:
            raise VolumeFullError(f"volume '{self.name}' is full: no space left on device")

    def write(self, relative: str, blocks: list[Path], mode: int, size: int | None = None) -> None:
        """Upload one file, made of blocks; given a size, blocks come without trailing zeros."""
        self.check_space()
        target = self.path(relative)
        temporary = target.with_name(target.name + TEMPORARY)
        with self.lock:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                for number, block in enumerate(blocks):
                    if size is not None:
                        file.seek(number * BLOCK)
                    with block.open("rb") as source:
                        shutil.copyfileobj(source, file)
                if size is not None:
                    file.truncate(size)
            temporary.chmod((mode or 0o644) & 0o777)
            temporary.replace(target)
            self._note_parents(target)
            self.note(str(target.relative_to(self.root.resolve())))

    def remove(self, relative: str) -> None:
        """Remove a file, or a folder with what it holds."""
        path = self.path(relative)
        with self.lock:
            names = [str(path.relative_to(self.root.resolve()))]
            if path.is_dir():
                names += [f"{names[0]}/{name}" for name in scan(str(path))]
            _remove(path)
            for name in reversed(names):
                self.note(name)

    def copy(self, sources: list[str], target: str, recursive: bool) -> None:
        """Copy files inside the volume, as `cp` would."""
        self.check_space()
        destination = self.path(target)
        with self.lock:
            into = destination.is_dir() or len(sources) > 1 or target.endswith("/")
            for source in map(self.path, sources):
                final = destination / source.name if into else destination
                if source.is_dir():
                    if not recursive:
                        raise IsADirectoryError(f"{source.name} is a folder")
                    shutil.copytree(source, final, dirs_exist_ok=True)
                else:
                    _copy(source, final)
                self._note_parents(final)
                top = str(final.relative_to(self.root.resolve()))
                self.note(top)
                for name in sorted(scan(str(final))):
                    self.note(f"{top}/{name}")

    def _note_parents(self, path: Path) -> None:
        for parent in reversed(path.relative_to(self.root.resolve()).parents[:-1]):
            if str(parent) not in self.log:
                self.note(str(parent))

    def checkout(self, sub_path: str, new_folder: Path) -> Checkout:
        """Return a copy of the volume, or of a folder in it, for one container."""
        sub_path = sub_path.strip("/")
        with self.lock:
            found = next((c for c in self.spares if c.sub_path == sub_path), None)
            if found is not None:
                self.spares.remove(found)
        if found is None:
            found = Checkout(self, sub_path, new_folder)
        found.pull()
        return found


class Checkout:
    """One container's copy of a volume."""

    def __init__(self, volume: Volume, sub_path: str, work: Path) -> None:
        self.volume, self.sub_path, self.work = volume, sub_path, work
        self.author = next(_authors)
        self.read_only = False
        self.number = 0  # of the last change of the volume that is in this copy
        self.known: dict[str, Signature] = {}
        work.mkdir(parents=True, exist_ok=True)

    def pull(self) -> int:
        """Bring in what others committed; return how many paths changed."""
        volume, prefix = self.volume, f"{self.sub_path}/" if self.sub_path else ""
        with volume.lock:
            changed: list[str] = []
            for path, (number, author) in reversed(volume.log.items()):
                if number <= self.number:
                    break
                if author != self.author and path.startswith(prefix):
                    changed.append(path)
            for path in reversed(changed):
                relative = path.removeprefix(prefix)
                source, target = volume.root / path, self.work / relative
                if os.path.lexists(source):
                    _copy(source, target)
                    is_folder = target.is_dir() and not target.is_symlink()
                    signature = FOLDER if is_folder else _signature(target)
                    if signature is not None:
                        self.known[relative] = signature
                else:
                    _remove(target)
                    self.known.pop(relative, None)
            self.number = volume.number
            return len(changed)

    def changes(self) -> tuple[dict[str, Signature], list[str], list[str]]:
        """Return what is there now, and which paths changed and went since the last commit."""
        now = scan(str(self.work))
        changed = [path for path, signature in now.items() if self.known.get(path) != signature]
        return now, changed, [path for path in self.known if path not in now]

    def commit(self) -> int:
        """Publish what changed; return how many paths did."""
        volume = self.volume
        with volume.lock:
            now, changed, gone = self.changes()
            if not changed and not gone:
                return 0
            volume.check_space()
            root = volume.root / self.sub_path
            prefix = f"{self.sub_path}/" if self.sub_path else ""
            for path in sorted(changed):
                _copy(self.work / path, root / path)
                volume.note(prefix + path, self.author)
            for path in gone:
                _remove(root / path)
                volume.note(prefix + path, self.author)
            self.known = now
            return len(changed) + len(gone)

    def release(self, clean: bool) -> None:
        """Keep the copy for the next container when it equals what was committed, else drop it."""
        volume = self.volume
        if clean and len(volume.spares) < MAX_SPARES:
            _, changed, gone = self.changes()
            if not changed and not gone:
                with volume.lock:
                    volume.spares.append(self)
                return
        shutil.rmtree(self.work, ignore_errors=True)
