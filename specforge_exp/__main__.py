"""`specforge <stage> ...`, `python -m specforge_exp <stage> ...`: the scripts, from any folder."""

import ast
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from specforge_exp.config.resolvers import REPOSITORY

STAGES = (
    "prefetch", "prep", "regen", "preprocess", "train", "export", "bench", "report", "chat",
    "pretrain", "sft",
)  # fmt: skip


def title(script: Path) -> str:
    """The first line of a script."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").splitlines()[0]


def overview() -> str:
    """All stages in order, a line each."""
    lines = [f"  {stage:11} {title(REPOSITORY / f'{stage}.py')}" for stage in STAGES]
    usage = "usage: specforge <stage> [option=value ...], or specforge --version"
    more = "`specforge <stage> --help` lists its options; --config-dir <folder> adds your own conf."
    tab = '`eval "$(specforge -sc install=bash)"` lets the tab key complete them.'
    return "\n".join([usage, "", *lines, "", more, tab])


COMPLETION = """\
_specforge()
{
    local line="${COMP_LINE:0:COMP_POINT}" stages="STAGES" choices words stage
    read -ra words <<< "$line"
    stage="${words[1]##*/}"
    if [[ "${line% *}" != *" "* && "$line" != *python* ]]; then
        choices=$stages
        compopt +o nospace
    elif [[ "${line% *}" == *" "* && " $stages " == *" ${stage%.py} "* ]]; then
        choices=$(COMP_LINE="${line#* }" "${words[@]:0:2}" -sc query=bash 2> /dev/null)
    else
        compopt +o nospace
    fi
    COMPREPLY=($(compgen -W "$choices" -- "${line##* }"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _specforge specforge python python3"""
"""For bash: the options of `specforge <stage>` and of the scripts. Hydra's own would run every
script that stands behind `python`, and knows no stage before the options."""


def main() -> NoReturn:
    """Become `python <stage>.py ...`: Hydra names the job after that file, and every message and
    record has a command that works."""
    stage, *words = sys.argv[1:] or ["--help"]
    if stage == "-sc":
        print(COMPLETION.replace("STAGES", " ".join(STAGES)))
        sys.exit()
    if stage in ("-h", "--help", "--version"):
        print(f"specforge {version('specforge-exp')}" if stage == "--version" else overview())
        sys.exit()
    if stage not in STAGES:
        sys.exit(f"error: {stage} is not a stage; choose one of: {', '.join(STAGES)}")
    os.execv(sys.executable, [sys.executable, str(REPOSITORY / f"{stage}.py"), *words])


if __name__ == "__main__":
    main()
