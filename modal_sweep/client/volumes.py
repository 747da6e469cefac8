"""Volumes of Modal by name: made, read, written to."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import modal


def volume(name: str) -> "modal.Volume":
    """A Volume by name, made as version 2 when it is missing."""
    import modal

    return modal.Volume.from_name(name, create_if_missing=True, version=2)


def read_if_there(source: "modal.Volume", path: str) -> bytes | None:
    """A file of a Volume, or None."""
    from modal import exception

    try:
        return b"".join(source.read_file(path))
    except (FileNotFoundError, exception.NotFoundError):
        return None


def exists(source: "modal.Volume", path: str) -> bool:
    """Whether a file or folder lies on a Volume."""
    from modal import exception

    try:
        return bool(source.listdir(path))
    except (FileNotFoundError, exception.NotFoundError):
        return False


def upload(target: "modal.Volume", local: Path, path: str) -> None:
    """Copy a file or folder to a Volume; content that is there already is not sent again."""
    with target.batch_upload(force=True) as batch:
        if local.is_dir():
            batch.put_directory(str(local), path)
        else:
            batch.put_file(str(local), path)
