"""Shards: any cut of the same conversations reads the same; how full rows get."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_exp.data.chat import Encoded
from specforge_exp.data.tokens import ShardWriter, arrays_of, packing, read_split
from specforge_exp.errors import InputError
from specforge_exp.records import write_json


def conversation(size: int) -> Encoded:
    return Encoded(list(range(size)), [(size // 3, size // 2), (size - 1, size)])


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=5), st.integers(1, 30)
)
def test_any_cut_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[list[int]], shard_tokens: int
) -> None:
    """A shard ends with the conversation that fills it, wherever the blocks end."""
    folder: Path = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, "train", shard_tokens)
    for sizes in blocks:
        writer.add(arrays_of([conversation(size) for size in sizes]))
    writer.flush()
    write_json(folder / "index.json", {"train": writer.shards})
    tokens = read_split(folder, "train")
    sizes = [size for block in blocks for size in block]
    assert [ids.tolist() for ids in tokens.ids] == [conversation(size).ids for size in sizes]
    assert [turns.tolist() for turns in tokens.turns] == [conversation(s).turns for s in sizes]
    filled = [shard["tokens"] for shard in writer.shards]
    assert all(shard_tokens <= tokens < shard_tokens + 9 for tokens in filled[:-1])
    assert sum(shard["supervised"] for shard in writer.shards) == sum(
        int((turns > 0).sum()) for turns in tokens.turns
    )


def test_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"index\.json cannot be read"):
        read_split(tmp_path, "train")


def best_fit_decreasing(lengths: list[int], row: int) -> int:
    """The rows, as the method reads."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        best = min(fitting, key=lambda i: room[i], default=None)
        if best is None:
            room.append(max(row, length))
            best = len(room) - 1
        room[best] -= length
    return len(room)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 32))
def test_packing_is_best_fit_decreasing(lengths: list[int], row: int) -> None:
    found = packing(np.array(lengths, np.int64), row)
    assert found["rows"] == best_fit_decreasing(lengths, row)
    size = sum(max(row, 0) for x in lengths if x <= row)
    assert 0 <= found["waste"] < 1
    assert not size or found["rows"] >= sum(x for x in lengths if x <= row) / row


def test_packing_of_a_million_is_quick() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 1_000_000)
    found = packing(lengths, 2048)
    assert found["waste"] < 0.01
    assert found["rows"] == pytest.approx(lengths.sum() / 2048, rel=0.01)
