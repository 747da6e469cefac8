"""The draft's vocabulary: the most frequent ids, as offsets and as a mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge_exp.drafts.vocabulary import check_mapping, vocabulary_mapping
from specforge_exp.errors import InputError


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_the_most_frequent_ids_in_order(counts: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(counts)))
    mapping = vocabulary_mapping(torch.tensor(counts), size)
    expected = sorted(sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:size])
    assert (mapping["d2t"] + torch.arange(size)).tolist() == expected
    assert mapping["t2d"].nonzero().flatten().tolist() == expected
    check_mapping(mapping["d2t"], mapping["t2d"])


def test_whole_vocabulary_is_the_identity() -> None:
    mapping = vocabulary_mapping(torch.tensor([3, 0, 1]), 3)
    assert mapping["d2t"].tolist() == [0, 0, 0]
    assert mapping["t2d"].tolist() == [True] * 3


def test_disagreement_is_refused() -> None:
    mapping = vocabulary_mapping(torch.tensor([3, 0, 1, 2]), 2)
    with pytest.raises(InputError, match="different tokens"):
        check_mapping(mapping["d2t"] + 1, mapping["t2d"])
    with pytest.raises(InputError, match="int64"):
        check_mapping(mapping["d2t"].int(), mapping["t2d"])
