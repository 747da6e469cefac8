"""prep: collect the prompts of a data set.

Reads the sources of data.train and data.eval; writes datasets/<data>/: train.jsonl, eval.jsonl
and, for records that are no conversation, train.rejected.jsonl and eval.rejected.jsonl.
"""

import hashlib
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from specforge_exp import paths
from specforge_exp.artifacts import Fingerprint, reusable, writing
from specforge_exp.config import Config, Source
from specforge_exp.conversations import content_id, write_jsonl
from specforge_exp.errors import InputError
from specforge_exp.provenance import sha256
from specforge_exp.sources import Rejected, from_first_user, local_files, read, reasons

log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass
class Split:
    """The conversations of train or eval, what was set aside, and the account of it."""

    kept: list[Record] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """What left the split besides the rejected, by reason."""
    cuts: Counter[str] = field(default_factory=Counter)
    """Conversations that were kept, but shortened."""
    read: int = 0

    def account(self) -> str:
        """Where everything went: read = kept + rejected (by reason) + ..."""
        parts = [f"kept {len(self.kept)}", f"rejected {len(self.rejected)}"]
        if self.rejected:
            parts[-1] += f" ({reasons(self.rejected)})"
        parts += [f"{what} {count}" for what, count in self.counts.items()]
        cuts = "".join(f"; {count} {what}" for what, count in self.cuts.items())
        return f"read {self.read} = {' + '.join(parts)}{cuts}"


def prep(cfg: Config) -> Path:
    """Write train.jsonl and eval.jsonl of this data set; returns their folder."""
    folder = paths.prompts_dir(cfg)
    if not cfg.data.train:
        raise InputError(
            "data.train names no source; choose data=sharegpt, or data=local data.path=<file>"
        )
    files = [file for source in [*cfg.data.train, *cfg.data.eval] for file in local_files(source)]
    settings = {
        "data.train": [asdict(source) for source in cfg.data.train],
        "data.eval": [asdict(source) for source in cfg.data.eval],
        "data.split_eval": cfg.data.split_eval,
        "data.sample_size": cfg.data.sample_size,
        "data.max_turns": cfg.data.max_turns,
        "number of local files": len(files),
    }
    fingerprint = Fingerprint({str(file): sha256(file) for file in files}, settings)
    if reusable(folder / "run.json", fingerprint, cfg.prep.force, "prep"):
        return folder
    with writing(folder, fingerprint, cfg) as partial:
        train = collect(cfg, "train", cfg.data.train, cfg.data.sample_size)
        if cfg.data.eval:
            held_out = collect(cfg, "eval", cfg.data.eval, None)
        else:
            held_out = hold_out(train, cfg.data.split_eval)
        drop_known(held_out, train)
        for name, split in (("train", train), ("eval", held_out)):
            log.info("prep: %s: %s", name, split.account())
            if not split.kept and (name == "train" or cfg.data.eval):
                raise InputError(f"data.{name} is left without a conversation: {split.account()}")
            write_jsonl(partial / f"{name}.jsonl", split.kept)
            if split.rejected:
                write_jsonl(partial / f"{name}.rejected.jsonl", map(asdict, split.rejected))
                first = split.rejected[0]
                log.warning(
                    "prep: set aside in %s.rejected.jsonl, the first: %s: %s",
                    folder / name, first.where, first.reason,
                )  # fmt: skip
    log.info("prep: %d + %d conversations in %s", len(train.kept), len(held_out.kept), folder)
    return folder


def collect(cfg: Config, name: str, sources: list[Source], most: int | None) -> Split:
    """Read sources in order into at most `most` different conversations, cut to max_turns."""
    split = Split()
    contents: set[str] = set()
    ids: set[str] = set()
    bar = tqdm(desc=f"prep {name}", unit="conv", disable=None)
    items = (item for source in sources for item in read(source))
    while most is None or len(split.kept) < most:
        item = next(items, None)
        if item is None:
            break
        split.read += 1
        bar.update()
        if isinstance(item, Rejected):
            split.rejected.append(item)
            continue
        record = shorten(item, cfg.data.max_turns, split.cuts)
        content = content_id(record["conversations"])
        if content in contents:
            split.counts["duplicate"] += 1
            continue
        contents.add(content)
        if record["id"] in ids:  # two sources may both count from 0
            record = {**record, "id": f"{record['id']}-{content}"}
        ids.add(record["id"])
        split.kept.append(record)
    bar.close()
    return split


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


def hold_out(train: Split, share: float) -> Split:
    """Move about `share` of the conversations out of train, chosen by a hash of their id.

    The choice does not depend on what else is in the data set, save that a share above 0 takes at
    least one conversation and leaves at least one.
    """
    ranks = {record["id"]: rank(record["id"]) for record in train.kept}
    ordered = sorted(ranks, key=ranks.__getitem__)
    count = sum(value < share for value in ranks.values())
    if share > 0:
        count = min(max(count, 1), len(ordered) - 1)
    chosen = set(ordered[: max(count, 0)])
    split = Split(kept=[r for r in train.kept if r["id"] in chosen], read=len(chosen))
    train.kept = [r for r in train.kept if r["id"] not in chosen]
    train.counts["held out"] += len(chosen)
    return split


def rank(name: str) -> float:
    """A number in [0, 1) that an id always gets."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def drop_known(held_out: Split, train: Split) -> None:
    """Leave out held-out conversations that open as a training conversation does."""
    known = {opening(record) for record in train.kept}
    fresh = [record for record in held_out.kept if opening(record) not in known]
    if len(fresh) < len(held_out.kept):
        held_out.counts["asked in training too"] += len(held_out.kept) - len(fresh)
    held_out.kept = fresh


def opening(record: Record) -> str:
    """The first user message."""
    return str(next(m["content"] for m in record["conversations"] if m["role"] == "user"))
