"""Token shards on disk: what preprocess writes and train reads.

`<split>-00000.safetensors` holds `ids` (int32), `turns` (int16) and `offsets` (int64, one more than
conversations); conversation c is ids[offsets[c]:offsets[c + 1]]. `index.json` lists the shards.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_exp.chat import Encoded
from specforge_exp.errors import InputError


@dataclass
class ShardWriter:
    """Collects conversations and writes a shard whenever enough tokens are there."""

    folder: Path
    split: str
    shard_tokens: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    pending: list[Encoded] = field(default_factory=list)
    pending_tokens: int = 0

    def add(self, encoded: Encoded) -> None:
        """Take one conversation."""
        self.pending.append(encoded)
        self.pending_tokens += len(encoded.ids)
        if self.pending_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as the next shard."""
        if not self.pending:
            return
        lengths = torch.tensor([0] + [len(e.ids) for e in self.pending])
        turns = torch.tensor([t for e in self.pending for t in e.turns], dtype=torch.int16)
        ids = torch.tensor([i for e in self.pending for i in e.ids], dtype=torch.int32)
        name = f"{self.split}-{len(self.shards):05d}.safetensors"
        save_file({"ids": ids, "turns": turns, "offsets": lengths.cumsum(0)}, self.folder / name)
        entry = {"file": name, "conversations": len(self.pending), "tokens": len(ids)}
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
    """index.json; InputError when it is missing or broken."""
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'index.json'} cannot be read: {error}") from None
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


def supervised_counts(tokens: TokenSet, vocabulary: int) -> Tensor:
    """How often each id stands at a supervised position; [V] int64."""
    counts_V = torch.zeros(vocabulary, dtype=torch.int64)
    for ids, turns in zip(tokens.ids, tokens.turns, strict=True):
        counts_V += torch.bincount(ids[turns > 0], minlength=vocabulary)
    return counts_V
