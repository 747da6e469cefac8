"""A conversation: what was said, how it is answered, and the commands that change either."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specforge_exp.config import ChatConfig
from specforge_exp.data.conversations import content_id, encode, read_jsonl
from specforge_exp.data.messages import Message
from specforge_exp.errors import InputError
from specforge_exp.records import write_whole

COMMANDS = {
    "/reset": "forget what was said",
    "/system": "TEXT, or none",
    "/temperature": "N; 0 is greedy",
    "/top_p": "N; 1 is off",
    "/save": "FILE, a line of JSON that prep reads, too",
    "/load": "FILE, its first conversation",
    "/help": "this",
    "/exit": "or Ctrl-D: end",
}
SAMPLING = ("temperature", "top_p")
KEYS = "Enter sends, Alt-Enter or Ctrl-J begins a line, Ctrl-C stops an answer"


@dataclass(frozen=True)
class Piece:
    """Some text of an answer."""

    text: str
    kind: str = "own"
    """own: the target's; drafted: by the draft, and kept by the target; thought: not sent back."""


@dataclass
class Spoken:
    """An answer that grows."""

    pieces: list[Piece] = field(default_factory=list)
    tokens: int = 0
    unit: str = "tokens"
    """What `tokens` counts: pieces, where a server has not said how many tokens they hold."""
    seconds: float = 0.0
    first_seconds: float = 0.0
    """Of `seconds`, until the first token was there."""
    gained: list[int] = field(default_factory=list)
    """Tokens that each verification of a draft added; empty without a draft."""
    end: str = ""
    """What is to be said about how it ended; empty: it came to its end."""

    @property
    def text(self) -> str:
        """What it says, without thoughts that are told apart."""
        return "".join(piece.text for piece in self.pieces if piece.kind != "thought")

    def status(self) -> str:
        """Accepted length, speed after the first token, length, end."""
        words = [f"{self.tokens} {self.unit}", self.end]
        if self.tokens > 1 and self.seconds > self.first_seconds:
            rate = (self.tokens - 1) / (self.seconds - self.first_seconds)
            words.insert(0, f"{rate:.0f} {self.unit}/s")
        if self.gained:
            words.insert(0, f"τ {sum(self.gained) / len(self.gained):.2f}")
        return " · ".join(filter(None, words))


@dataclass
class Dialogue:
    """A conversation and how it is answered."""

    model: str
    """Who answers; goes into a saved conversation."""
    settings: ChatConfig
    messages: list[Message] = field(default_factory=list)
    """Questions and answers in turn."""
    file: Path | None = None
    """Where it was saved or comes from."""

    @property
    def whole(self) -> list[Message]:
        """The messages after that of the system."""
        system = self.settings.system
        return [{"role": "system", "content": system}] * bool(system) + self.messages

    def obey(self, line: str) -> str:
        """Carry out a /command; what is to be shown.

        Raises:
            InputError, OSError: there is no such command, or it cannot be carried out.
        """
        name, _, rest = (word.strip() for word in line.partition(" "))
        match name:
            case "/reset":
                self.messages, self.file = [], None
                return "nothing was said"
            case "/system":
                system = rest.encode(errors="replace").decode()  # half characters of a terminal
                self.settings = replace(self.settings, system=system)
                return f"system: {rest or 'none'}"
            case "/temperature" | "/top_p":
                self.change({name[1:]: rest} if rest else {})
                return f"{name[1:]} {vars(self.settings)[name[1:]]:g}"
            case "/save" if rest:
                return self.save(Path(rest).expanduser())
            case "/load" if rest:
                return self.load(Path(rest).expanduser())
            case "/help":
                return "\n".join([*map("{0[0]:13}{0[1]}".format, COMMANDS.items()), KEYS])
        raise InputError(f"{line} is no command; /help lists them")

    def change(self, numbers: dict[str, Any]) -> None:
        """Set temperature and top_p, as far as they are in it; InputError for what does not fit."""
        try:
            given: dict[str, Any] = {n: float(numbers[n]) for n in SAMPLING if n in numbers}
        except (TypeError, ValueError) as error:
            raise InputError(f"no number: {error}") from None
        self.settings = replace(self.settings, **given)

    def save(self, path: Path) -> str:
        """Write it as one line of JSON; another file that is there stays as it is."""
        if path.exists() and path != self.file:
            raise InputError(f"{path} is there already; choose another name")
        if not self.messages:
            raise InputError("nothing was said yet")
        own = {name: vars(self.settings)[name] for name in SAMPLING}
        record = {"id": content_id(self.whole), "conversations": self.whole, "model": self.model}
        write_whole(path, encode(record | own) + b"\n")
        self.file = path
        return f"{path}: {len(self.messages)} messages"

    def load(self, path: Path) -> str:
        """Take a file's first conversation, up to its last answer; what was said in it."""
        records = read_jsonl(path)
        record: dict[str, Any] = next(records, {"conversations": []})
        messages = [{key: m[key] for key in ("role", "content")} for m in record["conversations"]]
        keys = {key for message in record["conversations"] for key in message}
        own = {"id", "conversations", "model", *SAMPLING}
        left = sorted(keys - {"role", "content"} | set(record) - own)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise InputError(f"{path}: no conversation with an answer")
        cut = len(messages) < len(record["conversations"])
        whole = not (left or cut) and next(records, None) is None
        self.change(record)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        self.settings = replace(self.settings, system=system)
        # Only what is all of it may be written over.
        self.messages, self.file = messages, path if whole else None
        told = ["> " * (m["role"] == "user") + m["content"] for m in messages]
        without = f", without {', '.join(left)}" if left else ""
        return "\n".join([*told, f"{path}: {len(messages)} messages{without}"])


Answering = Callable[[Dialogue], Generator[Spoken]]
"""Answers the last message of a dialogue; yields one object that grows.

Raises:
    InputError: it cannot, or no longer.
"""
