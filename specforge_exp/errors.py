"""The one exception that means: the user can mend this; and what any other says, in one line."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

REFUSALS = {
    # What may not be read or written, finds no room, or is more than a process may have.
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EPIPE,
    # The machine's own faults: a disk, a file system of the network, memory.
    errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip
"""Errors of the system that say what is wrong outside the program; others may be the program's."""
FULL = {errno.ENOSPC, errno.EDQUOT}
"""Those for want of room."""
IN_WORDS = re.compile(r"\(os error (\d+)\)")
"""How safetensors says such an error's number."""


class InputError(Exception):
    """A wrong option, file or environment; the message says what, where and which command helps.

    Entry scripts print it as one line, without a traceback, and exit with status 1.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def number_of(error: BaseException) -> int | None:
    """The system's number of an error, where it has one."""
    if isinstance(error, OSError):
        return error.errno
    told = IN_WORDS.search(str(error))
    return int(told[1]) if told else None


@contextmanager
def told_by_the_system() -> Iterator[None]:
    """InputError for what the system refuses, with the file's name."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        told = [str(error.filename)] if error.filename else []
        raise InputError(": ".join([*told, str(error.strerror)])) from error


@contextmanager
def naming(path: os.PathLike[str] | str) -> Iterator[None]:
    """Give an error the name of the file that is read: the system names it when it opens one
    alone."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
