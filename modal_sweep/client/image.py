"""The container image, and what makes two of them the same."""

import hashlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modal_sweep.config import ImageSettings
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.names import PYTHON, versions

if TYPE_CHECKING:
    import modal


def image_spec(settings: ImageSettings, root: Path | None) -> dict[str, Any]:
    """Everything that decides what is installed, as plain values.

    Raises:
        LaunchError: for another Python than this one, or a file that cannot be used.
    """
    if settings.python not in (None, PYTHON):
        raise LaunchError(
            f"image.python={settings.python} but the launching Python is {PYTHON}: payloads are "
            f"pickled, so both must be the same; launch with Python {settings.python} or drop it"
        )
    pinned = [f"{name}=={number}" for name, number in versions().items() if name != "python"]
    return {
        "base": settings.base,
        "python": PYTHON,
        "apt": list(settings.apt),
        "packages": [*pinned, *settings.packages, *project_packages(settings, root)],
        "env": dict(settings.env),
        **constraints(settings, root, pinned),
    }


def constraints(
    settings: ImageSettings, root: Path | None, pinned: list[str]
) -> dict[str, list[str]]:
    """The lines of a constraints.txt, without those that would contradict what is asked for."""
    if settings.constraints is None:
        return {}
    path = (root or Path()) / settings.constraints
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise LaunchError(f"image.constraints: {path} cannot be read: {error!r}") from None
    asked = {named(one) for one in [*pinned, *settings.packages] if re.search("[=@<>~]", one)}
    return {"constraints": [line for line in lines if line and named(line) not in asked]}


def named(package: str) -> str:
    """The name of a requirement, as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", package)[0]).lower()


def project_packages(settings: ImageSettings, root: Path | None) -> list[str]:
    """Dependencies and chosen extras of the project's pyproject.toml."""
    if settings.pyproject is None:
        return []
    path = (root or Path()) / settings.pyproject
    try:
        project = tomllib.loads(path.read_text())["project"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise LaunchError(f"image.pyproject: {path} cannot be read: {error!r}") from None
    extras = project.get("optional-dependencies", {})
    unknown = sorted(set(settings.extras) - set(extras))
    if unknown:
        raise LaunchError(
            f"image.extras: {path} has no extra {unknown[0]}; it has: {', '.join(sorted(extras))}"
        )
    chosen = [package for extra in settings.extras for package in extras[extra]]
    return [*project.get("dependencies", []), *chosen]


def digest(value: Any) -> str:
    """Short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def build(spec: dict[str, Any], folder: Path) -> "modal.Image":
    """The image of a spec, with the files of `folder` at /root."""
    import modal

    base = spec["base"]
    if base == "debian_slim":
        image = modal.Image.debian_slim(python_version=spec["python"])
    elif base.startswith("published:"):
        image = modal.Image.from_name(base.removeprefix("published:"))
    else:
        image = modal.Image.from_registry(base, add_python=spec["python"])
    if spec["apt"]:
        image = image.apt_install(*spec["apt"])
    options = ""
    if lines := spec.get("constraints"):
        options = "--constraint /constraints.txt"
        image = image.run_commands(f"printf '%s\\n' {shlex.join(lines)} > /constraints.txt")
    image = image.uv_pip_install(*spec["packages"], extra_options=options)
    if spec["env"]:
        image = image.env(spec["env"])
    return image.add_local_dir(folder, "/root")
