"""A file of conversations, encoded block by block, by this process or by several.

A block is a run of lines of a fixed size, so the blocks, and what becomes of each, do not depend on
who encodes it. A finished block is a file under its own name: an interrupted run keeps it, if it is
what was written.
"""

import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specforge_exp.config import Config
from specforge_exp.data.chat import (
    Chat,
    Encoded,
    Unrenderable,
    encode_many,
    eos_token_ids,
)
from specforge_exp.data.conversations import normalise
from specforge_exp.data.messages import is_given, reasoning_of, split_thoughts
from specforge_exp.data.tokens import Ints, arrays_of
from specforge_exp.errors import InputError, naming, told_by_the_system
from specforge_exp.provenance import cores
from specforge_exp.records import digest_of, replacing, write_whole
from specforge_exp.target import load_tokenizer

LINES, BYTES = 512, 8 * 2**20
"""A block ends after so many lines, or the line that passes so many bytes."""
BATCH = 64
"""Conversations tokenised together."""
CHECKED = 16
"""One of so many is checked against its answers."""


WORTH = 8
"""Blocks that take as long as starting a process, about."""


@dataclass(frozen=True)
class LineBlock:
    """Lines of one file."""

    path: Path
    number: int
    start: int
    stop: int
    """Bytes [start, stop)."""
    line: int
    """Number of its first line, from 1."""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.path.stem}-{self.number:06d}"


def cut(path: Path) -> list[LineBlock]:
    """The blocks of a JSON lines file, in order."""
    blocks: list[LineBlock] = []
    start = at = 0
    first = number = 1
    with naming(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            at += len(line)
            if number - first + 1 >= LINES or at - start >= BYTES:
                blocks.append(LineBlock(path, len(blocks), start, at, first))
                start, first = at, number + 1
    if at > start:
        blocks.append(LineBlock(path, len(blocks), start, at, first))
    return blocks


def make_chat(cfg: Config) -> Chat:
    """What encodes this target's conversations; InputError without a usable tokenizer."""
    tokenizer = load_tokenizer(cfg.model)
    eos = eos_token_ids(cfg.model.path, tokenizer)
    options = cfg.preprocess
    kwargs = cfg.model.chat_template_kwargs
    return Chat(
        tokenizer, kwargs, eos, options.thinking, options.last_turn_only, options.changed_turns
    )


def read_block(block: LineBlock) -> list[dict[str, Any]]:
    """Its conversations; InputError names file and line."""
    with naming(block.path), block.path.open("rb") as file:
        file.seek(block.start)
        lines = file.read(block.stop - block.start).removesuffix(b"\n").split(b"\n")
    records = []
    for number, line in enumerate(lines, block.line):
        try:
            records.append(normalise(json.loads(line)))
        except ValueError as error:
            raise InputError(f"{block.path}:{number}: {error}") from None
    return records


def encode_block(block: LineBlock, chat: Chat, cfg: Config, folder: Path) -> None:
    """Write `<name>.safetensors`: a shard with its account as metadata, and what was set aside."""
    account: Counter[str] = Counter()
    conversations, rejected = [], []
    records = read_block(block)
    for at in range(0, len(records), BATCH):
        batch = records[at : at + BATCH]
        for place, (record, result) in enumerate(zip(batch, encode_many(chat, batch), strict=True)):
            account["read"] += 1
            if isinstance(result, Encoded) and place % CHECKED == 0:
                check(record, result, chat, account)
            if isinstance(result, Encoded) and cfg.preprocess.source == "regen":
                compare_prompts(record, result, account)
            try:
                sequences = sequences_of(result, cfg, account, record["id"])
            except Unrenderable as error:
                account[f"set aside: {error}"] += 1
                rejected.append({"reason": "", **record} | {"reason": str(error)})
            else:
                cut = cut_answers(record, cfg)
                conversations += [open_ended(each, cut, chat, account) for each in sequences]
    for encoded in conversations:
        account["turns"] += len(encoded.spans)
        account["closed"] += sum(encoded.ids[last - 1] in chat.eos for _, last in encoded.spans)
    lines = "".join(json.dumps(record) + "\n" for record in rejected).encode()
    if rejected:
        write_whole(folder / f"{block.name}.rejected.jsonl", lines)
    arrays, metadata = arrays_of(conversations), {"account": json.dumps(account)}
    metadata["sha256"] = digest_of(arrays, metadata["account"].encode(), lines)
    with replacing(folder / f"{block.name}.safetensors") as partial:
        save_file(arrays, partial, metadata)


def cut_answers(record: dict[str, Any], cfg: Config) -> set[int]:
    """Which answers, from 1, ended because regen.max_tokens was reached."""
    reasons = record.get("finish_reasons", []) if cfg.preprocess.source == "regen" else []
    if "length" not in reasons:
        return set()
    own = own_answers(record)
    if len(own) != len(reasons):  # a call was cut, too: which is not told
        return set(range(1, sum(m["role"] == "assistant" for m in record["conversations"]) + 1))
    return {number for number, why in zip(own, reasons, strict=True) if why == "length"}


def own_answers(record: dict[str, Any]) -> list[int]:
    """Which answers of a regenerated conversation, from 1, are the model's own."""
    answers = [m for m in record["conversations"] if m["role"] == "assistant"]
    own = {number for number, m in enumerate(answers, 1) if not is_given(m)}
    if record["finish_reasons"][-1] == "tool_calls":  # that one is, calls before it are the data's
        own.add(len(answers))
    return sorted(own)


def compare_prompts(record: dict[str, Any], encoded: Encoded, account: Counter[str]) -> None:
    """Count answers whose prompt had another number of tokens where they were given: it was
    rendered otherwise there."""
    told = record.get("prompt_tokens")
    if not isinstance(told, list) or not record.get("finish_reasons"):  # of an older version
        return
    own = own_answers(record)
    tokens = dict(zip(own, told, strict=True)) if len(own) == len(told) else {}
    for sequence in (encoded, *encoded.apart):
        for number, (first, _) in zip(sequence.numbers, sequence.spans, strict=True):
            if tokens.get(number):
                account["prompts_checked"] += 1
                account["prompts_unlike"] += tokens[number] != first


def open_ended(encoded: Encoded, cut: set[int], chat: Chat, account: Counter[str]) -> Encoded:
    """Without the end of the answers that were cut: a template writes one, the model did not."""
    spans = []
    for number, (first, last) in zip(encoded.numbers, encoded.spans, strict=True):
        ended = number in cut and encoded.ids[last - 1] in chat.eos
        spans.append((first, last - ended))
        account["cut"] += number in cut
    return replace(encoded, spans=spans)


def sequences_of(
    result: Encoded | Unrenderable, cfg: Config, account: Counter[str], name: str
) -> list[Encoded]:
    """What is trained on of one conversation; raises Unrenderable when it is to be left out."""
    if isinstance(result, Unrenderable):
        raise result
    sequences, reasons = [], list(result.left_out)
    for sequence in (result, *result.apart):
        named = f"{name}#{sequence.numbers[-1]}" if result.apart else name
        try:
            sequences.append(fit(sequence, cfg, account, named))
        except Unrenderable as error:
            reasons += [str(error)] * max(1, len(sequence.numbers))
    if not sequences:
        raise Unrenderable(reasons[-1])
    account["kept"] += 1
    account["sequences"] += len(sequences)
    account["apart"] += sum(len(sequence.ids) for sequence in sequences[1:])
    account["changed"] += len(sequences) > 1
    account.update(f"turns left out: {reason}" for reason in reasons)
    return sequences


def fit(encoded: Encoded, cfg: Config, account: Counter[str], name: str) -> Encoded:
    """The sequence within max_length; raises Unrenderable when it is to be left out."""
    most = cfg.max_length
    overlong = cfg.preprocess.overlong if len(encoded.ids) > most else ""
    if overlong == "error":
        raise InputError(
            f"conversation {name} has {len(encoded.ids)} tokens, above max_length={most}; "
            "raise it, or set preprocess.overlong=truncate or drop"
        )
    if overlong == "drop":
        raise Unrenderable("longer than max_length")
    spans = [(a, min(b, most)) for a, b in encoded.spans if a < min(b, most)]
    behind = sum(first >= most for first, _ in encoded.spans)
    if not spans:
        raise Unrenderable("no assistant token" + (" within max_length" if behind else ""))
    account["truncated"] += overlong == "truncate"
    if behind:
        account["turns left out: behind max_length"] += behind
    return Encoded(encoded.ids[:most], spans, encoded.numbers[: len(spans)])


def check(record: dict[str, Any], encoded: Encoded, chat: Chat, account: Counter[str]) -> None:
    """Count answers, and their thoughts, that are not in what their supervised tokens spell."""
    answers = [m for m in record["conversations"] if m["role"] == "assistant"]
    for sequence in (encoded, *encoded.apart):
        for number, (first, last) in zip(sequence.numbers, sequence.spans, strict=True):
            message = answers[number - 1]
            _, inline, _, answer = split_thoughts(message["content"])
            thoughts = reasoning_of(message) or inline
            spelt = chat.tokenizer.decode(sequence.ids[first:last])
            account["checked"] += 1
            account["misread"] += answer.strip() not in spelt
            account["thoughtless"] += chat.thinking == "in" and thoughts.strip() not in spelt


def read_encoded(folder: Path, block: LineBlock) -> tuple[dict[str, Ints], Counter[str]]:
    """What `encode_block` wrote; ValueError when it was changed since."""
    with safe_open(folder / f"{block.name}.safetensors", "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    rejected = folder / f"{block.name}.rejected.jsonl"
    lines = rejected.read_bytes() if rejected.exists() else b""
    digest = digest_of(arrays, metadata["account"].encode(), lines)
    if metadata.get("sha256", digest) != digest:
        raise ValueError(f"{block.name} was changed after it was written")
    return arrays, Counter(json.loads(metadata["account"]))


def intact(folder: Path, block: LineBlock) -> bool:
    """Whether an interrupted run has left a block whole."""
    try:
        read_encoded(folder, block)
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return True


def encode_blocks(blocks: list[LineBlock], cfg: Config, folder: Path) -> Iterator[LineBlock]:
    """Encode the blocks, with as many processes as are wanted and useful; yields each when done.

    Raises:
        InputError: a line is no conversation, a conversation is refused, or a process was killed.
    """
    processes = cfg.preprocess.processes
    if processes is None:
        processes = min(cores(), len(blocks) // WORTH)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core
    chat = make_chat(cfg)
    if min(processes, len(blocks)) > 1:
        yield from in_processes(blocks, cfg, folder, min(processes, len(blocks)))
        return
    for block in blocks:
        encode_block(block, chat, cfg, folder)
        yield block


def in_processes(
    blocks: list[LineBlock], cfg: Config, folder: Path, processes: int
) -> Iterator[LineBlock]:
    """Deal the blocks to processes; none outlives this one by more than its block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # what all of them import is imported once
    waiting = iter(blocks)
    workers: dict[Connection, ForkServerProcess] = {}
    busy: dict[Connection, LineBlock] = {}

    def deal(to: Connection) -> None:
        if block := next(waiting, None):
            busy[to] = block
            with suppress(ConnectionError):  # it has died, as the next wait for it tells
                to.send(block)

    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=serve, args=(theirs, cfg, folder), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
            deal(ours)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                try:
                    complaint = ready.recv()
                except (EOFError, ConnectionError):
                    complaint = (
                        f"a process of preprocess died on {busy[ready].name} (out of memory?); run "
                        "the same command again, it continues; fewer preprocess.processes need less"
                    )
                if complaint:
                    raise InputError(complaint)
                yield busy.pop(ready)
                deal(ready)
    finally:
        for ours, worker in workers.items():
            ours.close()
            worker.terminate()
            worker.join()


def serve(connection: Connection, cfg: Config, folder: Path) -> None:
    """A worker: encode what comes until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; ours decides
    try:
        chat = make_chat(cfg)
        while True:
            block = connection.recv()
            complaint = None
            try:
                with told_by_the_system():
                    encode_block(block, chat, cfg, folder)
            except InputError as error:
                complaint = str(error)
            connection.send(complaint)
    except (EOFError, ConnectionError):
        return
