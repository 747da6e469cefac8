"""Token shards on disk: what preprocess writes and train reads.

`<split>-00000.safetensors` holds `ids` (int32), `turns` (int16) and `offsets` (int64, one more than
conversations); conversation c is ids[offsets[c]:offsets[c + 1]]. `index.json` lists the shards.

A shard is mapped, not read: opening a split costs 8 bytes per conversation, a page is read when a
conversation of it is asked for, and all processes of a machine share it. A shard that contradicts
the index is refused when it is opened, a conversation that is none of the model's when it is asked
for; both name the file and the command that makes it again.

Shape suffixes: T tokens, C conversations.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from specforge_exp.artifacts import check, read_object
from specforge_exp.config.machine import command
from specforge_exp.data.chat import Encoded
from specforge_exp.errors import InputError

Ints = NDArray[Any]


def arrays_of(conversations: list[Encoded]) -> dict[str, Ints]:
    """The content of a shard with these conversations."""
    offsets = np.cumsum([0, *(len(c.ids) for c in conversations)], dtype=np.int64)
    ids = np.zeros(offsets[-1], np.int32)
    turns = np.zeros(offsets[-1], np.int16)
    for at, conversation in zip(offsets.tolist(), conversations, strict=False):
        ids[at : at + len(conversation.ids)] = conversation.ids
        for number, (first, last) in enumerate(conversation.spans, 1):
            turns[at + first : at + last] = number
    return {"ids": ids, "turns": turns, "offsets": offsets}


@dataclass
class ShardWriter:
    """Collects blocks of conversations and writes a shard whenever enough tokens are there."""

    folder: Path
    split: str
    shard_tokens: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    pending: list[tuple[Ints, Ints, Ints]] = field(default_factory=list)
    """Ids, turns and lengths."""
    pending_tokens: int = 0

    def add(self, arrays: dict[str, Ints]) -> None:
        """Take the conversations of `arrays_of`; a shard ends with the one that fills it."""
        ids, turns, offsets = arrays["ids"], arrays["turns"], arrays["offsets"]
        done = 0
        while done < len(offsets) - 1:
            needed = offsets[done] + self.shard_tokens - self.pending_tokens
            stop = min(int(np.searchsorted(offsets, needed)), len(offsets) - 1)
            part = slice(offsets[done], offsets[stop])
            self.pending.append((ids[part], turns[part], np.diff(offsets[done : stop + 1])))
            self.pending_tokens += int(offsets[stop] - offsets[done])
            done = stop
            if self.pending_tokens >= self.shard_tokens:
                self.flush()

    def flush(self) -> None:
        """Write what is pending as the next shard."""
        if not self.pending:
            return
        ids, turns, lengths = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
        offsets = np.cumsum(np.append(0, lengths), dtype=np.int64)
        name = f"{self.split}-{len(self.shards):05d}.safetensors"
        save_file({"ids": ids, "turns": turns, "offsets": offsets}, self.folder / name)
        entry = {"file": name, "conversations": len(lengths), "tokens": len(ids)}
        self.shards.append({**entry, "supervised": int((turns > 0).sum())})
        self.pending, self.pending_tokens = [], 0


@dataclass(frozen=True)
class TokenShard:
    """Some conversations as they lie in a file."""

    path: Path
    ids: Tensor
    """[T] int32."""
    turns: Tensor
    """[T] int16: the assistant turn of each token, from 1; 0 elsewhere."""
    offsets: Tensor
    """[C + 1] int64."""


@dataclass(frozen=True)
class TokenSet:
    """The conversations of one split; `tokens[n]` is the ids and turns of one, int64."""

    shards: list[TokenShard]
    vocabulary: int = 2**31
    """Of the model: ids are below it."""

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each conversation."""
        sizes = [shard.offsets.diff().numpy() for shard in self.shards]
        return np.concatenate([np.zeros(0, np.int64), *sizes])

    @cached_property
    def first(self) -> list[int]:
        """The number of each shard's first conversation, and how many there are."""
        return [0, *np.cumsum([len(shard.offsets) - 1 for shard in self.shards]).tolist()]

    @cached_property
    def digest(self) -> str:
        """The same for the same conversations, whatever the shards."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for part in ("ids", "turns"):
            for shard in self.shards:
                digest.update(getattr(shard, part).numpy().tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self.first[-1]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        index = bisect_right(self.first, number) - 1
        shard = self.shards[index]
        at = number - self.first[index]
        start, stop = shard.offsets[at : at + 2].tolist()
        ids_T, turns_T = shard.ids[start:stop].long(), shard.turns[start:stop].long()
        limits = {"token": (ids_T, self.vocabulary), "turn": (turns_T, stop - start + 1)}
        for name, (values_T, limit) in limits.items():
            low, high = (int(end) for end in values_T.aminmax())
            if low < 0 or high >= limit:
                worst = low if low < 0 else high
                raise damaged(shard.path, f"its conversation {at} has a {name} {worst}")
        return ids_T, turns_T

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[number] for number in range(len(self)))

    def parts(self, conversations: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
        """All conversations in order, so many at a time: their turns [T] and lengths [C]."""
        for shard in self.shards:
            for at in range(0, len(shard.offsets) - 1, conversations):
                ends = shard.offsets[at : at + conversations + 1]
                yield shard.turns[ends[0] : ends[-1]].long(), ends.diff()


def again() -> str:
    """The remedy for tokens that cannot be used."""
    return f"make it again with: {command('preprocess', 'preprocess.force=true', away=False)}"


def damaged(path: Path, problem: object) -> InputError:
    """A token file that cannot be used, and the command that makes it again."""
    return InputError(f"{path} cannot be read ({problem}); {again()}")


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder that is what its record says; InputError when it is not."""
    check(folder, again().partition(": ")[2])
    index = read_object(folder / "index.json", again())
    if "train" not in index:
        raise InputError(f"{folder / 'index.json'} is no index; {again()}")
    return index


def read_split(folder: Path, split: str, vocabulary: int = 2**31) -> TokenSet:
    """The conversations of a split, of a model with so many tokens.

    Raises:
        InputError: a shard is missing, truncated or not what index.json says; it is named.
    """
    return TokenSet([open_shard(folder, entry) for entry in read_index(folder)[split]], vocabulary)


def open_shard(folder: Path, entry: dict[str, Any]) -> TokenShard:
    """Map a shard; InputError when it is not what its entry in index.json says."""
    path = folder / entry["file"]
    try:
        shard = TokenShard(path, **load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise damaged(path, error) from None
    ids, turns, offsets = shard.ids, shard.turns, shard.offsets
    types = [ids.dtype, turns.dtype, offsets.dtype]
    sizes = [len(offsets) - 1, len(ids)], [entry["conversations"], entry["tokens"]]
    if types != [torch.int32, torch.int16, torch.int64] or sizes[0] != sizes[1]:
        raise damaged(path, f"it does not hold what {folder / 'index.json'} says")
    ends = [int(offsets[0]), int(offsets[-1]), len(turns)]
    if ends != [0, len(ids), len(ids)] or not bool((offsets.diff() > 0).all()):
        raise damaged(path, "its offsets do not fit its tokens")
    return shard


def packing(lengths: Ints, row: int) -> dict[str, Any]:
    """How few rows of `row` tokens the conversations fill, best-fit decreasing.

    A longer conversation is a row of its own, as in training, and wastes nothing. Training packs
    within one step's conversations, so it gets there only with large steps.

    Returns:
        row_tokens, rows, and waste: the share of the rows' tokens that stays empty.
    """
    over = lengths[lengths > row]
    counts = np.bincount(lengths[lengths <= row], minlength=row + 1)
    room = np.zeros(row + 1, np.int64)  # rows by the tokens they have left
    rows = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            open_rows = np.flatnonzero(room[length:])
            tightest = length + int(open_rows[0]) if len(open_rows) else row
            copies = tightest // length
            if not len(open_rows):
                made = -(-left // copies)
                rows, room[row] = rows + made, made
            filled = min(left // copies, int(room[tightest]))
            if not filled:  # fewer than fill one row
                filled, copies = 1, left
            room[tightest] -= filled
            room[tightest - copies * length] += filled
            left -= filled * copies
    size = rows * row + int(over.sum())
    waste = 1 - float(lengths.sum()) / size if size else 0.0
    return {"row_tokens": row, "rows": rows + len(over), "waste": waste}
