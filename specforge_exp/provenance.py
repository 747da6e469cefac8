"""What made a number, beside options and inputs: the code, the packages and the machine."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specforge_exp.config import REPOSITORY, Config
from specforge_exp.config.own_code import own_files

PACKAGE = Path(__file__).parent
CPU = Path("/proc/cpuinfo")
PACKAGES = "torch transformers tokenizers safetensors hydra-core omegaconf numpy".split()
COMPUTE = "torch transformers tokenizers numpy".split()
"""Those of them that do."""


def code(cfg: Config) -> str:
    """Digest of the package's sources and of `own_code`, as they were when this process asked
    first: it imports them then, and what is edited later is not its own.
    """
    own = own_code(cfg)
    digest = code_at_first(os.getpid())
    return short_digest([digest, *sorted(own.values())]) if own else digest


@cache
def code_at_first(process: int) -> str:
    """Digest of the package's sources; `process` is not that of a fork's parent."""
    files = sorted(PACKAGE.rglob("*.py"))
    return short_digest([str(file.relative_to(PACKAGE)) + digest_of(file) for file in files])


def own_code(cfg: Config, *groups: str) -> dict[str, str]:
    """Digests of what loss and draft name outside of this package, by dotted path, with all that it
    imports from beside it; as they were when this process asked first.

    Args:
        cfg: the configuration.
        groups: loss, draft or both, which is all.
    """
    targets = {"loss": cfg.loss._target_, "draft": cfg.draft._target_}
    names = {targets[group] for group in groups or targets}
    digests = {f"the code of {name}": own_at_first(os.getpid(), name) for name in sorted(names)}
    return {name: digest for name, digest in digests.items() if digest}


@cache
def own_at_first(process: int, target: str) -> str:
    """Digest of `own_files`; "" where there are none. `process` as above."""
    files = own_files(target)
    return short_digest(map(digest_of, files)) if files else ""


def digest_of(file: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def short_digest(texts: Iterable[str]) -> str:
    """Of texts, in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def maker(cfg: Config) -> str:
    """The code and the packages of this process, in words."""
    versions = package_versions()
    return ", ".join([f"code {code(cfg)}", *(f"{name} {versions.get(name)}" for name in COMPUTE)])


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


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(device: str) -> str:
    """This machine's GPUs that a process sees which has loaded torch, unless `device` is cpu; else
    its cores."""
    torch: Any = sys.modules.get("torch")
    if torch and device != "cpu" and torch.cuda.is_available():
        here = range(torch.cuda.device_count())
        names = Counter(torch.cuda.get_device_name(number) for number in here)
        return ", ".join(f"{count} x {name}" for name, count in names.items())
    known = re.search(r"model name\s*: (.*)", CPU.read_text()) if CPU.exists() else None
    return f"{cores()} cores of {known[1] if known else platform.machine()}"
