"""A program in a real pseudo-terminal, its screen kept by pyte; and docs/chat.svg.

    python tests/chat_screen.py [option=value ...]

makes the picture of a chat with the quickstart's target and the draft that it has trained.
"""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "chat.svg"
SHADE = "4e4e4e"
"""Background of drafted text."""
PATIENCE = 240.0
"""Seconds after which a condition counts as never met."""


class TerminalScreen:
    """A command that believes to be in a terminal; used in a `with`, which ends it."""

    def __init__(self, command: list[str], cwd: Path, columns: int = 80, lines: int = 120) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (lines, columns))
        self.screen.write_process_input = self.type
        environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command], cwd=cwd, env=environment, stdin=slave,
            stdout=slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)

    def __enter__(self) -> "TerminalScreen":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(os.tcgetpgrp(self.master), signal.SIGKILL)
            self.process.wait()
        os.close(self.master)

    @property
    def text(self) -> str:
        """What the screen shows."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def type(self, keys: str) -> None:
        """Press keys; "\\r" is Enter, "\\x03" Ctrl-C."""
        os.write(self.master, keys.encode())

    def read(self, seconds: float) -> bool:
        """Take what the program writes within so many seconds; False: it has ended."""
        if select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:
                return False
            self.raw += data
            self.stream.feed(data)
        return True

    def until(self, condition: Callable[[str], object]) -> str:
        """Wait until the screen meets a condition; returns the screen."""
        deadline = time.monotonic() + PATIENCE
        while not condition(self.text):
            assert time.monotonic() < deadline, f"never met; the screen:\n{self.text}"
            assert self.read(0.2) or condition(self.text), f"ended; the screen:\n{self.text}"
        return self.text

    def ask(self, line: str) -> str:
        """Type a line and wait until the next prompt; returns the screen."""
        before = prompts(self.text)
        self.type(line + "\r")
        return self.until(lambda text: prompts(text) > before and waiting(text))

    def end(self) -> int:
        """Wait until the program ends by itself; its exit code."""
        while self.read(0.2):
            pass
        return self.process.wait()

    def shaded(self) -> str:
        """The characters that stand on the shade of drafted text."""
        cells = [
            row[column]
            for number in range(self.screen.lines)
            for row in [self.screen.buffer[number]]
            for column in range(self.screen.columns)
        ]
        return "".join(cell.data for cell in cells if cell.bg == SHADE)

    def picture(self, path: Path, title: str) -> None:
        """Save the screen as an SVG without fonts from elsewhere."""
        console = Console(record=True, width=self.screen.columns, file=io.StringIO())
        first = next(n for n, line in enumerate(self.screen.display) if line.startswith("> "))
        for number in range(first, self.text.count("\n") + 1):
            line = Text()
            row = self.screen.buffer[number]
            cells = [row[column] for column in range(self.screen.columns)]
            for style, run in groupby(cells, style_of):
                line.append("".join(cell.data for cell in run), style)
            console.print(line)
        svg = console.export_svg(title=title)
        path.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))


def style_of(cell: pyte.screens.Char) -> str:
    """A cell's colours as rich words them."""
    style = f"{colour(cell.fg)} on {colour(cell.bg)}"
    return style + " reverse" * cell.reverse + " bold" * cell.bold


def colour(name: str) -> str:
    """A colour of pyte's as rich names it."""
    return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else name.replace("brown", "yellow")


def prompts(text: str) -> int:
    """How many prompts a screen shows."""
    return sum(line.startswith(">") for line in text.splitlines())


def waiting(text: str) -> bool:
    """Whether the last prompt is empty: the line above the toolbar."""
    lines = [line for line in text.splitlines() if line]
    return len(lines) > 1 and lines[-2].strip() == ">"


if __name__ == "__main__":
    command = [sys.executable, "chat.py", "experiment=quickstart", "chat.temperature=0"]
    with TerminalScreen([*command, *sys.argv[1:]], ROOT, 100, 30) as chat:
        chat.until(waiting)
        chat.ask("Write a short story about Jonas the rabbit and a wooden flute in the garden.")
        chat.ask("/temperature 0.7")
        chat.ask("Tell me a story about a bear called Ben who finds a torn map in the forest.")
        chat.picture(PICTURE, "python chat.py experiment=quickstart")
        print(chat.text)
