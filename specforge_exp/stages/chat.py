"""chat: talk to the target, with its draft or alone, or to a server (chat.url).

Reads the target and, where there is one, checkpoints/<run_name>/export/; writes what /save says.
Text that is piped in is one question and gets one answer.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from specforge_exp import paths
from specforge_exp.artifacts import check
from specforge_exp.chat.dialogue import Answering, Dialogue
from specforge_exp.config import Config
from specforge_exp.config.machine import command
from specforge_exp.errors import InputError
from specforge_exp.inputs import require

log = logging.getLogger(__name__)


def chat(cfg: Config) -> None:
    """Talk until Ctrl-D, or answer what is piped in."""
    from specforge_exp.chat.terminal import Terminal, piped

    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # stdout is for the answer
            handler.setStream(sys.stderr)
    if cfg.chat.history:
        make_private(Path(cfg.chat.history))
    if sys.stdin.isatty() and sys.stdout.isatty():
        Terminal(*who_answers(cfg)).run()
        return
    text = sys.stdin.buffer.read().decode(errors="replace")
    if not text.strip():
        raise InputError("there is no question: type it in a terminal, or pipe it in")
    answering, dialogue = who_answers(cfg)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in any filter, without a traceback
    try:
        piped(answering, dialogue, text)
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_private(history: Path) -> None:
    """Make the file for its owner alone; InputError when it cannot be."""
    try:
        history.touch(mode=0o600)
    except OSError as error:
        raise InputError(f"chat.history={history}: {error.strerror}") from None


def who_answers(cfg: Config) -> tuple[Answering, Dialogue]:
    """The server, or the target with its draft or alone; and a dialogue with it."""
    if cfg.chat.url:
        from specforge_exp.chat.remote import RemoteModel

        return RemoteModel(cfg).answer, Dialogue(cfg.engine.served_name or cfg.chat.url, cfg.chat)
    import torch

    from specforge_exp.chat.local import LocalModel

    if cfg.model.gpu and cfg.device != "cpu" and not torch.cuda.is_available():
        here = command("chat", "device=cpu", away=False)
        raise InputError(
            f"model={cfg.model.name} is for a GPU (model.gpu={cfg.model.gpu}) and torch sees none; "
            f"talk to a server that has one: chat.url=...; or here, very slowly: {here}"
        )
    draft = draft_folder(cfg)
    name = cfg.run_name if draft == paths.export_dir(cfg) else draft
    name = f"{cfg.model.name} with {name}" if draft else f"{cfg.model.name} alone"
    return LocalModel(cfg, draft).answer, Dialogue(name, cfg.chat)


def draft_folder(cfg: Config) -> Path | None:
    """The export that chat.draft means; None: the target alone.

    Raises:
        InputError: it is not there, or is not what was written.
    """
    named, export = cfg.chat.draft, paths.export_dir(cfg)
    if named == "false":
        return None
    if named not in ("auto", "true"):
        check(Path(named), "export it again")
        return Path(named)
    if named == "auto" and not (export / "run.json").exists():
        log.info("no draft: %s is not there; %s makes it", export, command("export", away=False))
        return None
    return require(cfg, "export", "run.json")
