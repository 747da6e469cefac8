"""Which modules do the mounted sources import that their image does not install?

Containers run in the environment of the host, so a package that an image forgot is there all the
same. This compares the recorded image with the imports of the mounted Python files instead. What
an import inside `try` with a handler of ImportError names is optional and does not count.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import shlex
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from .state import ControlPlane, Fn

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*")
LOCKED = re.compile(r'^name = "([^"]+)"$', re.MULTILINE)
INSTALL = ("install", "add")
# Options of pip and uv whose next word is their value, not a package.
VALUED = {
    "-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--index", "--python", "-p",
    "-c", "--constraint", "-t", "--target", "--prefix", "--platform", "--default-index",
    "--index-strategy", "--python-version", "--trusted-host", "--torch-backend",
}  # fmt: skip


def canonical(name: str) -> str:
    """Return a distribution's name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def _modules_of() -> dict[str, set[str]]:
    """Return the top-level modules of every distribution of the host."""
    found: dict[str, set[str]] = {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in names:
            found.setdefault(canonical(name), set()).add(module)
    return found


@functools.cache
def _requirements(name: str) -> frozenset[str]:
    """Return what a distribution of the host requires, without extras."""
    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return frozenset()
    matches = [NAME.match(text) for text in texts if "extra ==" not in text]
    return frozenset(canonical(match[0]) for match in matches if match)


def _closure(names: set[str]) -> set[str]:
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += _requirements(name)
    return found


def installed_by(command: str) -> set[str]:
    """Return the distributions that a line of a Dockerfile installs by name."""
    if not command.startswith("RUN "):
        return set()
    found: set[str] = set()
    for part in re.split(r"&&|;|\|\|", re.sub(r"\$\([^)]*\)", "_", command[4:])):
        try:
            words = shlex.split(part)
        except ValueError:
            continue
        if not any(PurePosixPath(word).name in ("pip", "pip3", "uv") for word in words):
            continue
        start = next((i for i, word in enumerate(words) if word in INSTALL), None)
        if start is None:
            continue
        skip = False
        for word in words[start + 1 :]:
            if skip or word.startswith("-"):
                skip = word in VALUED and not skip
                continue
            match = NAME.match(word.split(" @ ")[0])
            if match and "/" not in match[0]:
                found.add(canonical(match[0]))
    return found


def image_packages(plane: ControlPlane, identity: str) -> set[str]:
    """Return the distributions that an image and those it is based on install."""
    image = plane.images.get(identity)
    if image is None:
        return set()
    found: set[str] = set()
    for base in image.base_images:
        found |= image_packages(plane, base.image_id)
    for command in image.dockerfile_commands:
        found |= installed_by(command)
    for file in image.context_files:
        text = file.data.decode(errors="replace")
        if file.filename.endswith("uv.lock"):
            found |= {canonical(name) for name in LOCKED.findall(text)}
        elif file.filename.endswith(".txt"):
            matches = [NAME.match(line.strip()) for line in text.splitlines()]
            found |= {canonical(match[0]) for match in matches if match}
    return found


def image_bases(plane: ControlPlane, identity: str) -> list[str]:
    """Return the registry images below an image."""
    image = plane.images.get(identity)
    if image is None:
        return []
    found = [name for base in image.base_images for name in image_bases(plane, base.image_id)]
    return found + [line[5:].strip() for line in image.dockerfile_commands if line[:5] == "FROM "]


def _is_guarded(node: ast.Try) -> bool:
    names = {"ImportError", "ModuleNotFoundError", "Exception"}
    for handler in node.handlers:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if any(kind is None or getattr(kind, "id", "") in names for kind in kinds):
            return True
    return False


def imported(source: str) -> set[str]:
    """Return the top-level modules that a source needs, wherever it imports them."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        elif isinstance(node, ast.Try) and _is_guarded(node):
            pending += [*node.handlers, *node.orelse, *node.finalbody]
            continue
        pending += ast.iter_child_nodes(node)
    return found


@functools.cache
def _imported_by(path: Path) -> frozenset[str]:
    """Cached: the store is content-addressed, so a path never changes its content."""
    try:
        return frozenset(imported(path.read_text(errors="replace")))
    except (SyntaxError, ValueError):
        return frozenset()


def _mounted(plane: ControlPlane, definition: Any) -> dict[PurePosixPath, Path]:
    return {
        PurePosixPath(file.filename): plane.cas / file.sha256_hex
        for identity in definition.mount_ids
        for file in plane.mounts.get(identity, ())
        if file.filename.endswith(".py")
    }


def missing_imports(plane: ControlPlane, fn: Fn) -> dict[str, list[str]]:
    """Return the modules that are neither of the standard library, mounted nor installed.

    The value of each is the mounted files that import it.
    """
    files = _mounted(plane, fn.definition)
    available = set(sys.stdlib_module_names) | {"modal", "modal_proto", "__main__"}
    for path in files:
        relative = path.relative_to("/root") if path.is_relative_to("/root") else path
        available.add(PurePosixPath(relative.parts[0]).stem)
        available.add(path.stem)
        available.add(path.parent.name)
    for name in _closure({"modal"} | image_packages(plane, fn.definition.image_id)):
        available |= _modules_of().get(name, {name.replace("-", "_")})
    missing: dict[str, list[str]] = {}
    for path, stored in sorted(files.items()):
        for module in _imported_by(stored) - available:
            missing.setdefault(module, []).append(str(path))
    return dict(sorted(missing.items()))
