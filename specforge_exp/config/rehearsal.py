"""What works on this machine when a command would rent another one: lines to type as they are."""

import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from specforge_exp.config.machine import CONFIG_FLAGS, program
from specforge_exp.config.resolvers import MATTERS, OF_THE_MODEL, REPOSITORY, STAGES

QUICKSTART = "experiment=quickstart"
CHOSEN = {"experiment", "model", "data", "engine", "resources", "hydra/launcher", "naming"}
"""Groups that the quickstart chooses itself."""
WITHIN = ("model.", "engine.", "resources.", "hydra.launcher.")
"""Options of what was chosen before."""
SERVER = [
    "engine=modal", "engine.image=debian_slim", "model.name=tiny_on_modal",
    'engine.command=[python,-m,specforge_exp.generation.local.serve,--model,"{model}",--port,"{port}"]',
]  # fmt: skip
"""Our own small server in the containers; the answers made here stay as they are."""


def without_account(stage: str, job: DictConfig) -> str:
    """What resources.without names: what a launch can be tried with when Modal knows nobody here.

    Args:
        stage: the script.
        job: the configuration of its first job.
    """
    if study():
        return offers(stage, "hydra.sweeper.dry_run=true", "what is searched, and where first")
    return offers(stage, "hydra.launcher.dry_run=true", "the jobs, their machines, the cost")


def study() -> bool:
    """Whether this command searches."""
    return any(word.startswith(("hparams_search=", "hydra/sweeper=optuna")) for word in sys.argv)


def offers(stage: str, own: str = "", shows: str = "") -> str:
    """The lines, each with a word on what it does.

    Args:
        stage: the script that was called.
        own: an option with which the command itself works here; "": none does.
        shows: what it prints then.
    """
    script, words, small = program(stage), carried(), QUICKSTART
    before = STAGES[1 : STAGES.index(stage)]
    if stage in OF_THE_MODEL:
        small, before = f"experiment={stage}_tiny", ("prep", "preprocess") * (stage == "sft")
    lines = [(shlex.join([*script, *sys.argv[1:], own]), shows)] if own else []
    for earlier in before:
        mattering = MATTERS.get(earlier, "").split()
        options = [word for word in words if word.partition("=")[0].split(".")[0] in mattering]
        if earlier in ("export", "train"):
            options = words
        if earlier != "regen" or "preprocess.source=prep" not in words:
            lines.append((shlex.join([*program(earlier), small, *options]), ""))
    flags = ["-m"] * bool({"-m", "--multirun"} & {*sys.argv})
    few = study() and "hydra.sweeper.n_trials=" not in " ".join(words)
    here = [*script, *flags, small, *words, *["hydra.sweeper.n_trials=4"] * few]
    lines.append((shlex.join(here), "the same with a tiny target, in minutes"))
    if Path.cwd() == REPOSITORY and (REPOSITORY / "tests" / "modal_local").is_dir():
        away = ["hydra/launcher=modal", *["sweep_name=on_modal"] * study()]  # one is done by then
        place = away if flags else SERVER * (stage == "regen")
        local = shlex.join(["python", "-m", "tests.modal_local", "--", *here, *place])
        lines += [(local, "on a Modal of this machine")] if place else []
    wide = max((len(line) for line, _ in lines if len(line) < 90), default=0)
    return "".join(
        f"\n  {line:{wide}}  # {what}" if what else f"\n  {line}" for line, what in lines
    )


def carried() -> list[str]:
    """The words of this command line that mean the same beside experiment=quickstart."""
    words: list[str] = []
    arguments = iter(sys.argv[1:])
    for word in arguments:
        key = word.partition("=")[0].lstrip("+~")
        if key in CONFIG_FLAGS:
            words += [word] if "=" in word else [word, next(arguments, "")]
        elif "=" in word and word[0] != "-" and key not in CHOSEN and not key.startswith(WITHIN):
            words.append(word)
    return words
