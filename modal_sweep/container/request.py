"""What the job's own process gets from the container's."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """A job, as the container starts it."""

    common: bytes
    config: bytes
    cwd: str
    versions: dict[str, str]
    """Of the launching Python."""
    environ: dict[str, str | None]
    """What `${oc.env:...}` was there; None: not set."""
    log: Path
    """What it prints."""
    result: Path
    """Where its envelope goes, as JSON."""


def checked(content: bytes, sha256: str) -> bytes:
    """Bytes whose hash came with the call; raises ValueError when they are others."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("this is not what the launcher sent")
    return content
