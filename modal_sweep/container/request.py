"""What the job's own process gets from the container's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """A job, as the container starts it."""

    reference: dict[str, Any]
    """The `ref` of its plan."""
    common: bytes
    config: bytes
    log: Path
    """What it prints."""
    result: Path
    """Where its envelope goes, as JSON."""
