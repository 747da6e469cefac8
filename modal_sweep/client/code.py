"""Which files go into the container, and the hash that names a version of the code."""

import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modal_sweep
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.outputs import file_digest

SUFFIXES = {".py", ".pyi", ".yaml", ".yml", ".json", ".toml", ".txt", ".jinja", ".cfg"}
SKIPPED = {"__pycache__", "node_modules", "outputs", "multirun", "wandb", "build", "dist"}
MOST_FILES = 2000
MOST_BYTES = 200_000_000


@dataclass(frozen=True)
class Shipment:
    """Files by their path in the container, and a hash over both."""

    files: dict[str, Path]
    digest: str


def project_root(task_function: Any) -> Path | None:
    """Folder of the script, or of the top-level package that holds the task, also with python -m;
    None for an installed package."""
    name = getattr(task_function, "__module__", None) or type(task_function).__module__
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    installed = {sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")}
    inside = any(path.is_relative_to(Path(folder).resolve()) for folder in installed)
    package = getattr(module, "__package__", None) or ""
    if inside and (package or name != "__main__"):
        return None
    return path.parents[len(package.split(".")) if package else 0]


def shipment(root: Path | None, sources: list[str] | None, leave_out: Path) -> Shipment:
    """Collect what goes to /root in the container.

    Args:
        root: the project's folder, or None to ship nothing but this package.
        sources: files and folders below it, and installed packages by their names; None for its
            source and configuration files.
        leave_out: the sweep's own folder, never shipped.
    """
    package = Path(modal_sweep.__file__).parent  # the container runs its worker
    files = {
        f"/root/modal_sweep/{path.relative_to(package).as_posix()}": path
        for path in package.rglob("*.py")
    }
    if root is not None:
        for relative, path in project_files(root, sources, leave_out.resolve()):
            files[f"/root/{relative}"] = path
    size = sum(path.stat().st_size for path in files.values())
    if len(files) > MOST_FILES or size > MOST_BYTES:
        raise LaunchError(
            f"{root} would ship {len(files)} files, {size / 1e6:.0f} MB, to every container; "
            "name the folders that the job needs in image.sources"
        )
    return Shipment(files, digest_of(files))


def digest_of(files: dict[str, Path]) -> str:
    """Hash of files by their path in the container."""
    digest = hashlib.sha256()
    for remote, path in sorted(files.items()):
        digest.update(f"{remote}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def project_files(
    root: Path, sources: list[str] | None, leave_out: Path
) -> Iterator[tuple[str, Path]]:
    """Relative path and path of every file to ship."""
    if sources is None:
        for path in walk(root, leave_out):
            if path.suffix in SUFFIXES:
                yield path.relative_to(root).as_posix(), path
        return
    for source in sources:
        start, above = (root / source).resolve(), root
        if not start.exists() and (package := installed_package(source)):
            start, above = package, package.parent
        if not start.exists():
            raise LaunchError(f"image.sources: {root / source} does not exist")
        if not start.is_relative_to(above):
            raise LaunchError(f"image.sources: {source} is not below the script's folder {root}")
        for path in [start] if start.is_file() else walk(start, leave_out):
            yield path.relative_to(above).as_posix(), path


def installed_package(name: str) -> Path | None:
    """The folder of a package that can be imported."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def walk(folder: Path, leave_out: Path) -> Iterator[Path]:
    """Files below a folder, without hidden ones, environments, caches and earlier sweeps."""
    for here, folders, names in os.walk(folder):
        path = Path(here)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in SKIPPED
            and not (path / name / "pyvenv.cfg").exists()
            and not (path / name / "modal" / "jobs.jsonl").exists()
            and (path / name).resolve() != leave_out
        )
        for name in sorted(names):
            if not name.startswith(".") and not name.endswith(".pyc"):
                yield path / name
