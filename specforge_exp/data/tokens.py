"""Token shards on disk: what preprocess writes and train reads.

`<split>-00000.safetensors` holds `ids` (int32), `turns` (int16) and `offsets` (int64, one more than
conversations); conversation c is ids[offsets[c]:offsets[c + 1]]. `index.json` lists the shards.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from specforge_exp.artifacts import SAME, check, read_object
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
class TokenSet:
    """The conversations of one split, in memory."""

    ids: list[Tensor]
    turns: list[Tensor]

    def __len__(self) -> int:
        return len(self.ids)


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder that is what its record says; InputError when it is not."""
    again = f"python preprocess.py preprocess.force=true {SAME}"
    check(folder, again)
    index = read_object(folder / "index.json", f"make it with: {again}")
    if "train" not in index:
        raise InputError(f"{folder / 'index.json'} is no index; make it again with: {again}")
    return index


def read_split(folder: Path, split: str) -> TokenSet:
    """All conversations of a split; InputError names a shard that is missing or truncated."""
    ids: list[Tensor] = []
    turns: list[Tensor] = []
    for shard in read_index(folder)[split]:
        path = folder / shard["file"]
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); make it again: preprocess.force=true"
            ) from None
        sizes = arrays["offsets"].diff().tolist()
        ids += arrays["ids"].long().split(sizes)
        turns += arrays["turns"].long().split(sizes)
    return TokenSet(ids, turns)


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
