"""What made an artifact: command, commit, versions, inputs; kept beside it as run.json."""

import hashlib
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specforge_exp.config import REPOSITORY, Config

PACKAGES = "torch transformers tokenizers safetensors hydra-core omegaconf numpy".split()


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
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    partial.replace(path)
