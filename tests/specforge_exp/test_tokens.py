"""Shards: any cut of the same conversations reads the same; how full rows get."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from specforge_exp.data.chat import Encoded
from specforge_exp.data.tokens import ShardWriter, arrays_of, packing, read_split
from specforge_exp.errors import InputError
from specforge_exp.records import write_json


def conversation(size: int) -> Encoded:
    spans = [(size // 3, size // 2), (size - 1, size)]
    return Encoded(list(range(size)), [(first, last) for first, last in spans if first < last])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=5), st.integers(1, 30)
)
@example(blocks=[[9], [9, 9]], shard_tokens=10)
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
    assert [ids.tolist() for ids, _ in tokens] == [conversation(size).ids for size in sizes]
    assert [turns.tolist() for _, turns in tokens] == [conversation(s).turns for s in sizes]
    assert tokens.lengths.tolist() == sizes
    parts = list(tokens.parts(3))
    packed = [turn for turns, _ in parts for turn in turns.tolist()]
    assert packed == [turn for size in sizes for turn in conversation(size).turns]
    assert [length for _, lengths in parts for length in lengths.tolist()] == sizes
    filled = [shard["tokens"] for shard in writer.shards]
    assert all(shard_tokens <= tokens < shard_tokens + 9 for tokens in filled[:-1])
    assert sum(shard["supervised"] for shard in writer.shards) == sum(
        int((turns > 0).sum()) for _, turns in tokens
    )


def test_a_digest_is_of_the_conversations_and_not_of_the_shards(tmp_path: Path) -> None:
    def digest(name: str, shard_tokens: int, *sizes: int) -> str:
        return digest_of(name, shard_tokens, [conversation(size) for size in sizes])

    def digest_of(name: str, shard_tokens: int, conversations: list[Encoded]) -> str:
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name, "eval", shard_tokens)
        writer.add(arrays_of(conversations))
        writer.flush()
        write_json(tmp_path / name / "index.json", {"train": [], "eval": writer.shards})
        return read_split(tmp_path / name, "eval").digest

    assert digest("one", 99, 7, 5, 9) == digest("three", 1, 7, 5, 9)
    assert len({digest("a", 99, 5, 7, 9), digest("b", 99, 7, 5), digest("c", 99, 7, 5, 9)}) == 3
    last = (1, 2)
    cuts = [Encoded([1, 2], [last]), Encoded([3, 4], [last])], [
        Encoded([1, 2, 3], [last]), Encoded([4], [(0, 1)])
    ]  # fmt: skip
    other = [Encoded([1, 2], [(0, 2)]), Encoded([3, 4], [last])]
    alike = [digest_of(str(n), 99, each) for n, each in enumerate((*cuts, other))]
    assert len(set(alike)) == 3  # the same ids: other lengths, other turns


@pytest.mark.parametrize(
    ("name", "at", "value", "problem"),
    [
        ("ids", 4, 64, "its conversation 1 has a token 64"),
        ("ids", 4, -1, "its conversation 1 has a token -1"),
        ("turns", 4, -1, "its conversation 1 has a turn -1"),
        ("turns", 4, 9, "its conversation 1 has a turn 9"),
        ("offsets", 1, 9, "its offsets do not fit its tokens"),
        ("offsets", 1, 8, "its offsets do not fit its tokens"),
        ("offsets", 2, 7, "its offsets do not fit its tokens"),
        ("offsets", None, None, "it does not hold what"),
        ("ids", None, None, "it does not hold what"),
        ("turns", None, None, "its offsets do not fit its tokens"),
    ],
)
def test_a_damaged_shard_is_named(
    tmp_path: Path, name: str, at: int | None, value: int, problem: str
) -> None:
    """One line, with the file and the command; whole conversations of it are still read."""
    writer = ShardWriter(tmp_path, "train", 99)
    writer.add(arrays_of([conversation(3), conversation(5)]))
    writer.flush()
    write_json(tmp_path / "index.json", {"train": writer.shards})
    path = tmp_path / "train-00000.safetensors"
    arrays = load_file(path)
    arrays[name] = arrays[name][:-1].copy() if at is None else arrays[name].copy()
    if at is not None:
        arrays[name][at] = value
    save_file(arrays, path)
    with pytest.raises(InputError) as refused:
        tokens = read_split(tmp_path, "train", 64)
        assert len(tokens[0][0]) == 3
        tokens[1]
    assert str(refused.value).startswith(f"{path} cannot be read ({problem}")
    assert "python preprocess.py preprocess.force=true" in str(refused.value)


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
@example(lengths=[8, 6, 4, 3, 3], row=12)
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
