"""`specforge <stage> ...`, `python -m specforge_exp <stage> ...`: the scripts, from any folder."""

import ast
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from specforge_exp.config.resolvers import REPOSITORY, SCRIPTS


def title(script: Path) -> str:
    """The first line of a script."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").splitlines()[0]


def overview() -> str:
    """All stages in order, a line each."""
    lines = [f"  {stage:11} {title(REPOSITORY / f'{stage}.py')}" for stage in SCRIPTS]
    usage = "usage: specforge <stage> [option=value ...], or specforge --version"
    more = "`specforge <stage> --help` lists its options; --config-dir <folder> adds your own conf."
    tab = '`eval "$(specforge -sc install=bash)"` lets the tab key complete them.'
    return "\n".join([usage, "", *lines, "", more, tab])


def main() -> NoReturn:
    """Become `python <stage>.py ...`: Hydra names the job after that file, and every message and
    record has a command that works."""
    stage, *words = sys.argv[1:] or ["--help"]
    if stage == "-sc":
        print((REPOSITORY / "assets" / "completion.bash").read_text())
        sys.exit()
    if stage in ("-h", "--help", "--version"):
        print(f"specforge {version('specforge-exp')}" if stage == "--version" else overview())
        sys.exit()
    if stage not in SCRIPTS:
        sys.exit(f"error: {stage} is not a stage; choose one of: {', '.join(SCRIPTS)}")
    os.execv(sys.executable, [sys.executable, str(REPOSITORY / f"{stage}.py"), *words])


if __name__ == "__main__":
    main()
