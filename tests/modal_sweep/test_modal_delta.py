"""Compression against something alike brings back what went in."""

from hypothesis import given
from hypothesis import strategies as st

from modal_sweep.protocol import delta


@given(st.binary(max_size=60_000), st.binary(max_size=60_000))
def test_what_is_packed_comes_back(data: bytes, alike: bytes) -> None:
    assert delta.unpack(delta.pack(data, alike), alike) == data


@given(st.integers(0, 70_000), st.binary(max_size=20))
def test_a_small_difference_is_small(at: int, change: bytes) -> None:
    alike = b"".join(b"%d of many;" % number for number in range(6000))
    data = alike[:at] + change + alike[at + 3 :]
    assert len(delta.pack(data, alike)) < len(alike) / 40
