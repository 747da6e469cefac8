"""Commands that stand still where a test says so: who is slower than they are still finds them.

`environment()` lets Python run in_each_process/sitecustomize.py in every process of a command,
which knows `hold`.
"""

import os
from pathlib import Path

IN_EACH = str(Path(__file__).with_name("in_each_process"))


def environment() -> dict[str, str]:
    """This process's, and what a command needs to be held."""
    places = filter(None, (IN_EACH, os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def hold(folder: Path, at: int) -> None:
    """Let who writes to the folder go no further than this, also who is started again.

    A training logs nothing after step `at`; a regeneration keeps no answer of more chunks than
    that. Both go on when a signal comes that they listen to.
    """
    path = folder.with_name(f"{folder.name}.hold")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(str(at))
    new.replace(path)


def release(folder: Path) -> None:
    """Let them go on."""
    folder.with_name(f"{folder.name}.hold").unlink()
