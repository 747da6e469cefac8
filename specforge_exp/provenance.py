"""What made a number, beside options and inputs: the code and the packages."""

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from specforge_exp.config import REPOSITORY, Config

PACKAGE = Path(__file__).parent
PACKAGES = "torch transformers tokenizers safetensors hydra-core omegaconf numpy".split()


def code(cfg: Config) -> str:
    """Digest of the package's sources and of the modules that loss and draft name, as they were
    when this process asked first: it imports them then, and what is edited later is not its own.
    """
    targets = {cfg.loss._target_, cfg.draft._target_}
    return code_at_first(os.getpid(), *sorted(name.rpartition(".")[0] for name in targets))


@cache
def code_at_first(process: int, *modules: str) -> str:
    """The same, of the package and these modules; `process` is not that of a fork's parent."""
    files = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("*.py")}
    for name in modules:
        if not name.startswith(f"{PACKAGE.name}."):
            with suppress(Exception):  # what cannot be found is said where it is used
                spec = find_spec(name)
                files |= {name: Path(str(spec.origin))} if spec and spec.has_location else {}
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def git_commit() -> str | None:
    """Commit of the working tree, marked -dirty when it differs; None outside git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
