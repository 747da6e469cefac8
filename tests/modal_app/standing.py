"""Lets a job stand still where a test wants it to: it goes along to the container."""

from pathlib import Path


def held(folder: str | None, name: str, steps: int) -> bool:
    """Whether a test wants it to take no more steps yet."""
    try:
        return folder is not None and steps >= int((Path(folder) / name).read_text())
    except FileNotFoundError:
        return False
