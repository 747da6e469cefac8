"""A chat in a terminal, and one answer to piped text: prompt_toolkit reads, rich draws."""

import signal
import sys
import termios
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from specforge_exp.chat.dialogue import COMMANDS, Answering, Dialogue, Spoken
from specforge_exp.errors import InputError

STYLES = {"own": "", "drafted": "grey93 on grey30", "thought": "italic dim"}
"""Both colours are given for drafted text: it has to be read on dark and on light."""
CONTROLS = {n: "�" for n in [*range(32), *range(127, 160)] if chr(n) not in "\n\t"}
"""What a terminal would obey instead of showing it."""
FRAME = 0.08
"""Seconds between two drawings."""
KEYS = KeyBindings()


@KEYS.add("enter")
def send(event: KeyPressEvent) -> None:
    """Enter sends."""
    event.current_buffer.validate_and_handle()


@KEYS.add("escape", "enter")
@KEYS.add("c-j")
def begin_line(event: KeyPressEvent) -> None:
    """Alt-Enter and Ctrl-J begin another line."""
    event.current_buffer.insert_text("\n")


def question(text: str) -> dict[str, str]:
    """The user's message; half characters, which a terminal may send, are replaced."""
    return {"role": "user", "content": text.strip().encode(errors="replace").decode()}


def piped(answering: Answering, dialogue: Dialogue, text: str) -> None:
    """Answer a text once: the answer alone goes to stdout, its status to stderr."""
    dialogue.messages.append(question(text))
    told, spoken = "", Spoken()
    for spoken in answering(dialogue):
        print(spoken.text[len(told) :], end="", flush=True)
        told = spoken.text
    print(flush=True)
    print(spoken.status(), file=sys.stderr)


class Terminal:
    """A chat until Ctrl-D or /exit."""

    def __init__(self, answering: Answering, dialogue: Dialogue) -> None:
        self.answering, self.dialogue, self.status = answering, dialogue, "/help, Ctrl-D ends"
        self.console = Console(highlight=False)
        history = dialogue.settings.history
        self.prompt: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=KEYS,
            history=FileHistory(history) if history else InMemoryHistory(),
            completer=WordCompleter([*COMMANDS], sentence=True),
            complete_while_typing=False,
            bottom_toolbar=self.toolbar,
        )

    def toolbar(self) -> str:
        """Below the line that is typed: the settings, and the last answer's figures."""
        own = self.dialogue.settings
        settings = f"temperature {own.temperature:g} · top_p {own.top_p:g}"
        return f"{self.dialogue.model} · {settings} · {self.status}"

    def run(self) -> None:
        """Read and answer; what is typed meanwhile waits for the next prompt."""
        with untouched():
            self.talk()

    def talk(self) -> None:
        """Take turns until the last."""
        going = True
        while going:
            try:
                going = self.turn()
            except KeyboardInterrupt:  # also one that comes while another is dealt with
                continue
            except EOFError:
                return
            except (InputError, OSError) as error:
                self.tell(f"error: {error}", "red")

    def tell(self, text: str, style: str = "dim") -> None:
        """Print what is not the model's."""
        self.console.print(Text(text.translate(CONTROLS), style))

    def turn(self) -> bool:
        """Read a line and do what it wants; False: it was the last."""
        text = self.prompt.prompt().strip()
        if text.startswith("/") and text != "/exit":
            self.tell(self.dialogue.obey(text))
        elif text and text != "/exit":
            self.ask(text)
        return text != "/exit"

    def ask(self, text: str) -> None:
        """Show the answer to a question; both are kept when there is anything of an answer.

        Raises:
            InputError: there was none to the end; the question is not kept either.
        """
        messages = self.dialogue.messages
        self.dialogue.messages = [*messages, question(text)]
        try:
            spoken = show(self.console, self.answering(self.dialogue))
            if spoken.text:
                answer = {"role": "assistant", "content": spoken.text}
                messages = [*self.dialogue.messages, answer]
            self.status = spoken.status()
        finally:
            self.dialogue.messages = messages


def show(console: Console, answers: Generator[Spoken]) -> Spoken:
    """Draw an answer as it comes, as far as the screen holds it, and print it whole at its end.

    Ctrl-C ends it, which its `end` then says.
    """
    latest, drawn = Spoken(), 0.0
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for spoken in answers:
                latest = spoken
                if time.monotonic() - drawn > FRAME:
                    lines = styled(latest).wrap(console, console.width)[3 - console.height :]
                    with undisturbed():
                        live.update(Group(*lines, Text(latest.status(), "dim")), refresh=True)
                    drawn = time.monotonic()
    except KeyboardInterrupt:
        latest.end = "stopped"
    finally:
        answers.close()
        console.print(styled(latest), Text(latest.status(), "dim"), "", sep="\n")
    return latest


def styled(spoken: Spoken) -> Text:
    """The answer with its kinds of text told apart."""
    return Text.assemble(*((p.text.translate(CONTROLS), STYLES[p.kind]) for p in spoken.pieces))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put a Ctrl-C off to the end: what was drawn in part would be drawn again."""
    late: list[object] = []
    before = signal.signal(signal.SIGINT, lambda *event: late.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if late:
        raise KeyboardInterrupt


@contextmanager
def untouched() -> Iterator[None]:
    """Between two prompts, keep what is typed from the screen, and Enter apart from Ctrl-J."""
    before = termios.tcgetattr(sys.stdin)
    quiet = [before[0] & ~termios.ICRNL, *before[1:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
