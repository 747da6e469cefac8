"""Text as rows of a fixed length, endlessly: read, tokenised by other processes, cut, mixed.

Documents follow one another in a row, each ended by the end-of-text token; one that does not fit
goes on in the next row, from the last token that was seen, so that every token is predicted once.
Which source a row comes from follows from its number and the weights. So a place in the stream is a
few numbers per source (the document a row begins in, and the token of it), and whoever starts there
gets the same rows, whatever the processes and however far they had read ahead.

Shape suffixes: T tokens of a row.
"""

import hashlib
import json
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from specforge_exp.artifacts import content_of
from specforge_exp.config.causal import PretrainConfig, TextSource
from specforge_exp.data import synthetic
from specforge_exp.data.files import (
    INSTALL_DATA,
    SUFFIXES,
    Columns,
    Rejected,
    parse,
    passed_over,
    shown,
)
from specforge_exp.data.sources import hub_name, stand_ins
from specforge_exp.errors import InputError, first_line

TEXTS = (*SUFFIXES, ".txt")
"""Ends of the names of files with text."""
MADE = 5000
"""Documents of a synthetic source."""
BLOCK = 32
"""Documents that a process tokenises at a time."""
DIED = "a process that tokenises has died; run the same command to continue"
STATE = "stream:state"
"""Name of the tensor that a checkpoint keeps."""


@dataclass(frozen=True)
class TextRow:
    """So many tokens, of documents one after the other."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    lengths: list[int]
    """Tokens of each document's piece."""


@dataclass(frozen=True)
class Tokens:
    """How text becomes tokens."""

    backend: str
    """The tokenizer as JSON."""
    end: int
    """The token behind every document."""


@dataclass
class Place:
    """Where a source's next row begins."""

    document: int
    """Of the pass under way; what is held out is not counted."""
    token: int = 0
    rows: int = 0
    """Made so far."""


def documents(source: TextSource, first: int, held_out: int) -> Iterator[tuple[int, str]]:
    """Documents by their number in a pass, from number `first` on, pass after pass.

    Args:
        source: where they come from.
        first: of the pass under way.
        held_out: so many at the beginning belong to no pass.

    Raises:
        InputError: it cannot be read, or nothing is left to train on.
    """
    while True:
        number, empty = first, first == 0  # whoever goes on in a pass has had what stands before
        for text in texts(source, held_out + first):
            yield number, text
            number += 1
            empty = empty and not text
        if empty:
            raise InputError(
                f"pretrain.sources: {source.path} has no text beyond the first {held_out} "
                "documents, which are held out (pretrain.eval_documents)"
            )
        first = 0


def texts(source: TextSource, skip: int) -> Iterator[str]:
    """The documents of a source after the first `skip`, once."""
    scheme, _, rest = source.path.partition(":")
    if scheme == "hub":
        yield from hub_texts(source, skip)
        return
    made = synthetic_texts(rest) if scheme == "synthetic" else file_texts(source)
    yield from islice(made, skip, None)


def synthetic_texts(split: str) -> Iterator[str]:
    """Templated conversations, their messages as lines of text."""
    try:
        for record in synthetic.generate(split, MADE):
            yield "\n".join(message["content"] for message in record["conversations"])
    except ValueError as error:
        raise InputError(f"pretrain.sources: synthetic:{split}: {error}") from None


def files_of(source: TextSource) -> list[Path]:
    """The files of a source, in order; InputError for what cannot be read."""
    path = Path(source.path).expanduser()
    inside = [p for p in shown(path) if p.name.endswith(TEXTS)]
    files = sorted(inside) or [path]
    if not all(file.is_file() and file.name.endswith(TEXTS) for file in files):
        others = passed_over(source.path, TEXTS)
        only = f", only {others} is in it" if others else ""
        raise InputError(
            f"pretrain.sources: {path} is no {', '.join(TEXTS)} file nor a folder of them{only}; a "
            "data set of the hub is hub:<id>[/<configuration>][:<split>]"
        )
    return files


def file_texts(source: TextSource) -> Iterator[str]:
    """The documents of files, in order."""
    for file in files_of(source):
        with file.open("rb") as lines:
            if file.suffix == ".txt":
                yield from paragraphs(file, lines)
                continue
            for found in parse(str(file), lines, Columns(source.field)):
                if isinstance(found, Rejected):
                    raise InputError(f"{found.where}: {found.reason}")
                yield text_of(found[1], source, found[0])


def paragraphs(file: Path, lines: Any) -> Iterator[str]:
    """What stands between empty lines; InputError for bytes that are no UTF-8."""
    kept: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}:{number} is not UTF-8: {error.reason}") from None
        if text.strip():
            kept.append(text)
        elif kept:
            yield "".join(kept)
            kept = []
    if kept:
        yield "".join(kept)


def hub_texts(source: TextSource, skip: int) -> Iterator[str]:
    """The documents of a data set of the hub, streamed."""
    name, part, split = hub_name(source.path.removeprefix("hub:"))
    try:
        from datasets import load_dataset

        rows = load_dataset(name, part or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows.skip(skip) if skip else rows, skip):
            yield text_of(row, source, f"{source.path}#{number}")
    except InputError:
        raise
    except ModuleNotFoundError:
        raise InputError(f"{source.path} needs: {INSTALL_DATA}") from None
    except Exception as error:  # the hub client raises dozens of types, also in mid-stream
        raise InputError(f"{source.path} cannot be read: {first_line(error)}") from None


def text_of(record: Any, source: TextSource, where: str) -> str:
    """A record's text; InputError when it has none."""
    text = record.get(source.field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(
            f"{where} has no text in `{source.field}` (there is: {keys}); name the column with "
            "pretrain.sources' field"
        )
    return text


def encode(tokenizer: Any, end: int, block: list[str]) -> list[Any]:
    """Tokens of documents, each with the end token behind it."""
    encoded = (encoding.ids for encoding in tokenizer.encode_batch(block))
    return [np.array([*ids, *([] if ids[-1:] == [end] else [end])], np.int32) for ids in encoded]


def work(connection: Connection, tokens: Tokens) -> None:
    """A process that tokenises until its pipe is closed."""
    from tokenizers import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; ours decides
    tokenizer = Tokenizer.from_str(tokens.backend)
    try:
        while True:
            connection.send(encode(tokenizer, tokens.end, connection.recv()))
    except (EOFError, OSError):  # the one that asked is gone
        return


@dataclass
class Workers:
    """Processes that tokenise, dealt to in turn; answers come in the order of the questions."""

    tokens: Tokens
    processes: int
    pipes: list[Connection] = field(default_factory=list)
    own: Any = None

    def start(self) -> None:
        """Start them; with 0 this process does it."""
        if not self.processes and self.own is None:
            from tokenizers import Tokenizer

            self.own = Tokenizer.from_str(self.tokens.backend)
        context = get_context("spawn")
        while len(self.pipes) < self.processes:
            ours, theirs = context.Pipe()
            context.Process(target=work, args=(theirs, self.tokens), daemon=True).start()
            theirs.close()
            self.pipes.append(ours)

    def encoded(self, blocks: Iterator[list[tuple[int, str]]]) -> Iterator[tuple[int, Any]]:
        """Numbered documents, in blocks -> their tokens, in order."""
        self.start()
        waiting: deque[tuple[list[int], Any]] = deque()
        for turn, block in enumerate(blocks):
            numbers, words = [n for n, _ in block], [text for _, text in block]
            if self.own is not None:
                yield from zip(numbers, encode(self.own, self.tokens.end, words), strict=True)
                continue
            # A process is asked again when it has answered, or both could wait for full pipes.
            answered = self.answer(waiting.popleft()) if len(waiting) == self.processes else []
            pipe = self.pipes[turn % self.processes]
            try:
                pipe.send(words)
            except ConnectionError:
                raise InputError(DIED) from None
            waiting.append((numbers, pipe))
            yield from answered

    def answer(self, asked: tuple[list[int], Connection]) -> list[tuple[int, Any]]:
        """The tokens of a block, by the numbers of its documents."""
        try:
            return list(zip(asked[0], asked[1].recv(), strict=True))
        except (EOFError, ConnectionError):
            raise InputError(DIED) from None


def blocks_of(numbered: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """So many documents at a time."""
    block = []
    for document in numbered:
        block.append(document)
        if len(block) == BLOCK:
            yield block
            block = []


def rows_of(encoded: Iterator[tuple[int, Any]], place: Place, length: int) -> Iterator[TextRow]:
    """Rows of `length` tokens; `place` is where the next one begins."""
    parts: list[Any] = []
    room = length
    begin = place.token
    for number, ids in encoded:
        at, begin = begin, 0
        while len(ids) - at > 1:
            parts.append(ids[at : at + room])
            room -= len(parts[-1])
            at += len(parts[-1])
            if room:
                break
            over = at >= len(ids)
            at = 0 if over else at - 1
            place.document, place.token = number + over, at
            place.rows += 1
            yield TextRow(np.concatenate(parts), [len(part) for part in parts])
            parts, room = [], length
            if over:
                break


@dataclass
class RowStream:
    """The rows of a mixture."""

    sources: list[TextSource]
    tokens: Tokens
    length: int
    """Tokens of a row."""
    held_out: int
    """Documents at the beginning of each source that are in no row."""
    processes: int = 0
    places: list[Place] = field(default_factory=list)
    readers: list[Iterator[TextRow]] = field(default_factory=list)
    states: dict[int, list[Any]] = field(default_factory=dict)
    """The places after the last steps, by the steps done."""

    def __post_init__(self) -> None:
        self.places = [Place(0) for _ in self.sources]

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was; what was read is forgotten."""
        places = json.loads(bytes(state[STATE].tolist()))
        self.places, self.readers = [Place(*numbers) for numbers in places], []

    def state(self, step: int) -> dict[str, Any]:
        """Where the rows of the step after `step` begin, as a tensor; {} where nobody reads."""
        import torch

        if step not in self.states:
            return {}
        text = json.dumps(self.states[step]).encode()
        return {STATE: torch.tensor(list(text), dtype=torch.uint8)}

    def start(self) -> None:
        """Open the sources at their places."""
        for source, place in zip(self.sources, self.places, strict=True):
            numbered = documents(source, place.document, self.held_out)
            encoded = Workers(self.tokens, self.processes).encoded(blocks_of(numbered))
            self.readers.append(rows_of(encoded, place, self.length))

    def take(self, step: int, rows: int) -> list[TextRow]:
        """The next rows, which are those of this step."""
        if not self.readers:
            self.start()
        taken = [next(self.readers[self.next_source()]) for _ in range(rows)]
        self.states[step + 1] = [list(vars(place).values()) for place in self.places]
        self.states = {done: state for done, state in self.states.items() if done > step - 4}
        return taken

    def next_source(self) -> int:
        """The source that has given least for its weight."""
        total = sum(place.rows for place in self.places) + 1
        share = sum(source.weight for source in self.sources)
        short = [
            source.weight / share * total - place.rows
            for source, place in zip(self.sources, self.places, strict=True)
        ]
        return short.index(max(short))


def held_out(own: PretrainConfig, tokens: Tokens, length: int) -> Any:
    """The first documents of every source in pieces of at most `length` tokens, as a TokenShard."""
    import torch
    from tokenizers import Tokenizer

    from specforge_exp.data.tokens import TokenShard

    tokenizer, pieces = Tokenizer.from_str(tokens.backend), []
    for source in own.sources:
        first = list(islice(texts(source, 0), own.eval_documents))
        for ids in encode(tokenizer, tokens.end, first):
            pieces += [ids[at : at + length] for at in range(0, len(ids), length)]
    offsets = torch.tensor([0, *map(len, pieces)]).cumsum(0)
    ids_T = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.zeros(0).int()
    return TokenShard(Path("held out"), ids_T, torch.ones_like(ids_T).short(), offsets)


def text_digest(source: TextSource) -> str:
    """What tells local files from others; the hub's own stand for themselves."""
    remote = source.path.startswith(("hub:", "synthetic:"))
    files = stand_ins(source.path) if remote else files_of(source)
    if not files:
        return source.path
    found = {str(file): content_of(file) for file in files}
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
