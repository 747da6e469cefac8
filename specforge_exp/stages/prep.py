"""prep: collect the prompts of a data set.

Reads the sources of data.train and data.eval; writes datasets/<data>/: train.jsonl, eval.jsonl,
account.json and, for records that are no conversation, train.rejected.jsonl and
eval.rejected.jsonl. Records go to disk as they are read: memory holds two hashes of each (160 B).
"""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import orjson
from tqdm import tqdm

from specforge_exp import paths
from specforge_exp.artifacts import (
    Fingerprint,
    check,
    differing,
    read_object,
    read_record,
    reusable,
    sha256,
    writing,
)
from specforge_exp.config import Config, Source
from specforge_exp.config.machine import command
from specforge_exp.data.conversations import encode
from specforge_exp.data.files import Rejected
from specforge_exp.data.messages import joined
from specforge_exp.data.sources import (
    depends_on,
    from_first_user,
    read,
    reasons,
    unread,
)
from specforge_exp.errors import InputError
from specforge_exp.inputs import unchanged
from specforge_exp.records import write_json

log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass
class PromptSplit:
    """The files of train or eval, and the account of what went where."""

    path: Path
    out: IO[bytes]
    aside: IO[bytes]
    read: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Records that are no conversation, by reason."""
    counts: Counter[str] = field(default_factory=Counter)
    """What left the split besides the rejected, by reason."""
    cuts: Counter[str] = field(default_factory=Counter)
    """Conversations that were kept, but changed or worth a word."""
    first: Rejected | None = None

    def keep(self, record: Record) -> None:
        """Write a conversation."""
        self.out.write(encode(record) + b"\n")
        self.kept += 1

    def reject(self, item: Rejected) -> None:
        """Set a record aside."""
        self.first = self.first or item
        self.rejected[item.kind] += 1
        self.aside.write(encode(asdict(item)) + b"\n")

    def account(self) -> str:
        """Where everything went: read = kept + rejected (by reason) + ..."""
        parts = [f"kept {self.kept}", f"rejected {self.rejected.total()}"]
        if self.rejected:
            parts[-1] += f" ({reasons(self.rejected)})"
        parts += [f"{what} {count}" for what, count in self.counts.items()]
        cuts = "".join(f"; {count} {what}" for what, count in self.cuts.items())
        return f"read {self.read} = {' + '.join(parts)}{cuts}"


FILES = "number of local files"


def prep(cfg: Config) -> Path:
    """Write train.jsonl and eval.jsonl of this data set; returns their folder."""
    folder = paths.prompts_dir(cfg)
    if not cfg.data.train:
        raise InputError(
            "data.train names no source; choose data=sharegpt, or data=local data.path=<file>"
        )
    names = "train eval split_eval sample_size max_turns"
    settings = {f"data.{name}": asdict(cfg.data)[name] for name in names.split()}
    if cfg.data.system != "keep":
        settings["data.system"] = cfg.data.system
    if cfg.prep.check:
        return state(cfg, folder, settings)
    files = [file for source in [*cfg.data.train, *cfg.data.eval] for file in depends_on(source)]
    settings[FILES] = len(files)
    digests = {file: sha256(file) for file in files}
    fingerprint = Fingerprint({str(file): digest for file, digest in digests.items()}, settings)
    if reusable(folder / "run.json", fingerprint, cfg.prep.force, "prep"):
        return folder
    with writing(folder, fingerprint, cfg, "prep") as partial:
        with opened(partial, "train") as train, opened(partial, "eval") as held_out:
            fill(cfg, train, held_out)
        for name, split in (("train", train), ("eval", held_out)):
            if not split.kept and (name == "train" or cfg.data.eval):
                first = f"; the first: {said(split.first)}" if split.first else ""
                raise InputError(
                    f"data.{name} is left without a conversation: {split.account()}{first}. A "
                    'record is {"conversations": [{"role": "user", "content": "..."}, ...]}; '
                    "data.format= and docs/data.md have others"
                )
            report(name, split, folder)
        for source in [*cfg.data.train, *cfg.data.eval]:
            if others := unread(source):
                log.info("prep: %s: not read of its records: %s", source.path, ", ".join(others))
        counts = {"train": train.kept, "eval": held_out.kept}
        account = {"train": train.account(), "eval": held_out.account()}
        write_json(partial / "account.json", {"conversations": counts, "account": account})
        unchanged(digests)
    log.info("prep: %d + %d conversations in %s", train.kept, held_out.kept, folder)
    return folder


@contextmanager
def opened(folder: Path, name: str) -> Iterator[PromptSplit]:
    """A split to write to; without rejected records it leaves no file of them."""
    path, rejected = folder / f"{name}.jsonl", folder / f"{name}.rejected.jsonl"
    with path.open("wb") as out, rejected.open("wb") as aside:
        split = PromptSplit(path, out, aside)
        yield split
    if not split.rejected:
        rejected.unlink()


def fill(cfg: Config, train: PromptSplit, held_out: PromptSplit) -> None:
    """Write both splits; what is held out is chosen by `rank` unless data.eval names it."""
    share = 0.0 if cfg.data.eval else cfg.data.split_eval
    for record in different(cfg, train, cfg.data.train, cfg.data.sample_size):
        (held_out if share and rank(record["id"]) < share else train).keep(record)
    if cfg.data.eval:
        for record in different(cfg, held_out, cfg.data.eval, None):
            held_out.keep(record)
    train.out.flush()
    held_out.out.flush()
    if share:
        leave_one_each(train, held_out)
        held_out.read = train.counts["held out"] = held_out.kept
    drop_known(train, held_out)


def different(
    cfg: Config, split: PromptSplit, sources: list[Source], most: int | None
) -> Iterator[Record]:
    """At most `most` different conversations of the sources, in order, cut to max_turns."""
    contents: set[int] = set()
    ids: set[int] = set()
    items = itertools.chain.from_iterable(map(read, sources))
    for item in tqdm(items, desc=f"prep {split.path.stem}", unit="conv", disable=None):
        split.read += 1
        if isinstance(item, Rejected):
            split.reject(item)
            continue
        record = shorten(item, cfg.data.max_turns, split.cuts)
        if cfg.data.system == "join":
            record = {**record, "conversations": joined(record["conversations"])}
        content = content_hash(record)
        if content in contents:
            split.counts["duplicate"] += 1
            continue
        contents.add(content)
        if short_hash(record["id"].encode()) in ids:  # two sources may both count from 0
            record = {**record, "id": f"{record['id']}-{content:016x}"}
        ids.add(short_hash(record["id"].encode()))
        if record.get("image"):
            split.cuts["about a picture"] += 1
        yield record
        if len(contents) == most:
            return


def shorten(record: Record, max_turns: int | None, cuts: Counter[str]) -> Record:
    """The conversation from its first user message to its `max_turns`-th answer."""
    shorter = from_first_user(record)
    if shorter is not record:
        cuts["without the answers before their first user message"] += 1
    messages = shorter["conversations"]
    ends = [number for number, m in enumerate(messages, 1) if m["role"] == "assistant"]
    if max_turns is None or len(ends) < max_turns or ends[max_turns - 1] == len(messages):
        return shorter
    cuts["cut at max_turns"] += 1
    return {**shorter, "conversations": messages[: ends[max_turns - 1]]}


def leave_one_each(train: PromptSplit, held_out: PromptSplit) -> None:
    """Move one conversation where a share above 0 took none of two, or all.

    The share itself is by `rank`, so that it does not depend on what else is in the data set.
    """
    if held_out.kept and not train.kept:
        giver, taker, pick = held_out, train, max
    elif train.kept > 1 and not held_out.kept:
        giver, taker, pick = train, held_out, min
    else:
        return
    with giver.path.open("rb") as file:
        ranks = ((rank(orjson.loads(line)["id"]), number) for number, line in enumerate(file))
        _, moved = pick(ranks)
    rewrite(giver, [moved], taker)


def drop_known(train: PromptSplit, held_out: PromptSplit) -> None:
    """Leave out held-out conversations that open as a training conversation does."""
    with held_out.path.open("rb") as file:
        openings = [opening(orjson.loads(line)) for line in file]
    held_out_openings = set(openings)
    with train.path.open("rb") as file:
        in_training = {
            key for line in file if (key := opening(orjson.loads(line))) in held_out_openings
        }
    dropped = [number for number, hashed in enumerate(openings) if hashed in in_training]
    if dropped:
        held_out.counts["asked in training too"] += len(dropped)
        rewrite(held_out, dropped, None)


def rewrite(giver: PromptSplit, numbers: list[int], taker: PromptSplit | None) -> None:
    """Take the lines of these numbers out of a split, into another one or out of both."""
    leaving, rest = set(numbers), giver.path.with_name("rest")
    with giver.path.open("rb") as lines, rest.open("wb") as out:
        for number, line in enumerate(lines):
            if number not in leaving:
                out.write(line)
            elif taker:
                taker.out.write(line)
                taker.kept += 1
    rest.replace(giver.path)
    giver.kept -= len(leaving)
    if taker:
        taker.out.flush()


def short_hash(data: bytes) -> int:
    """64 bits: among ten million records two differing ones meet with a chance of 3e-6."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def content_hash(record: Record) -> int:
    """Equal for records that put the same to a model: messages, tools and picture."""
    content = [record["conversations"], record.get("tools"), record.get("image")]
    return short_hash(encode(content, sort=True))


def opening(record: Record) -> int:
    """Hash of the first user message and of the picture it is about."""
    question = next(m["content"] for m in record["conversations"] if m["role"] == "user")
    return short_hash(encode([question, record.get("image")]))


def rank(name: str) -> float:
    """A number in [0, 1) that an id always gets."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def said(rejected: Rejected) -> str:
    """Where a record stands that is none, and why."""
    return f"{rejected.where}: {rejected.reason}"


def report(name: str, split: PromptSplit, folder: Path) -> None:
    """Say where the records of a split went."""
    log.info("prep: %s: %s", name, split.account())
    if split.first:
        where = folder / f"{name}.rejected.jsonl"
        log.warning("prep: set aside in %s, the first: %s", where, said(split.first))
    if split.cuts["about a picture"]:
        log.warning(
            "prep: %s: %d conversations are about a picture; only their text is used, `image` "
            "keeps the reference: training on pictures is out of scope (data.format=image takes "
            "<image>, <video> and <audio> out of the text)",
            name, split.cuts["about a picture"],
        )  # fmt: skip


def state(cfg: Config, folder: Path, settings: dict[str, Any]) -> Path:
    """Say whether the data set is there, how large, and whether its inputs changed.

    Raises:
        InputError: it is not there; the message is the command that makes it.
    """
    made, again = folder / "run.json", command("prep", "prep.force=true", away=False)
    if not made.exists():
        raise InputError(f"{folder} does not exist; make it with: {command('prep', away=False)}")
    record = read_record(made, f"make it again with: {again}")
    check(folder, again)
    account = folder / "account.json"
    counts = read_object(account).get("conversations", {}) if account.exists() else {}
    size = sum(file.stat().st_size for file in folder.glob("*.jsonl")) / 1e6
    when = datetime.fromisoformat(record["finished"]).astimezone()
    log.info(
        "prep: %s: %s training and %s held-out conversations, %.1f MB, made %s",
        folder, counts.get("train", "?"), counts.get("eval", "?"), size, f"{when:%Y-%m-%d %H:%M}",
    )  # fmt: skip
    counted = {FILES: record["settings"].get(FILES)}  # they are looked at below
    changes = differing(settings | counted, record)
    try:
        times = {
            str(file): file.stat().st_mtime
            for source in [*cfg.data.train, *cfg.data.eval]
            for file in depends_on(source)
        }
        changes += [f"{name} is gone" for name in record["inputs"] if name not in times]
        changes += [f"{name} is new" for name in times if name not in record["inputs"]]
        changes += [f"{n} was written later" for n, t in times.items() if t > made.stat().st_mtime]
    except InputError as error:
        changes.append(str(error))
    if changes:
        log.warning("prep: it was made of something else: %s; again: %s", "; ".join(changes), again)
    else:
        log.info("prep: its inputs have not changed")
    return folder
