"""Plans: what begins alike goes together, nothing is lost, a plan is read back as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_exp.data.conversations import BadRecord
from specforge_exp.generation.plan import CHUNK_BYTES, load_plan, make_plan, save_plan


def write(path: Path, *questions: str, **more: object) -> Path:
    lines = [
        json.dumps({"id": str(n), "conversations": [{"role": "user", "content": text}], **more})
        for n, text in enumerate(questions)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def groups(path: Path, chunk_size: int) -> list[list[int]]:
    plan = make_plan(path, "d", chunk_size, None)
    return [plan.members(chunk).tolist() for chunk in range(len(plan))]


def test_without_shared_beginnings_the_order_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(f"question {n}" for n in range(10)))
    assert groups(path, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_lines_without_an_id_are_different(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"conversations": [{"role": "user", "content": str(n)}]} for n in (1, 2, 1)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert make_plan(path, "d", 4, None).twice.tolist() == [2]


def test_an_id_is_there_once(tmp_path: Path) -> None:
    """Whatever the line says beside it, and whether it is a number or text."""
    path = tmp_path / "a.jsonl"
    texts = [{"role": "user", "content": str(n)} for n in range(5)]
    names = ["x", 0, "x", "0", "y"]
    records = [{"id": n, "conversations": [text]} for n, text in zip(names, texts, strict=True)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert make_plan(path, "d", 4, None).twice.tolist() == [2, 3]


def test_shared_beginnings_go_together(tmp_path: Path) -> None:
    prefixes = [letter * 600 for letter in "abc"]
    path = write(tmp_path / "a.jsonl", *(prefixes[n % 3] + str(n) for n in range(12)))
    assert groups(path, 4) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_the_longer_beginning_is_nearer(tmp_path: Path) -> None:
    short, long = "s" * 200, "s" * 200 + "l" * 3000
    path = write(tmp_path / "a.jsonl", long + "1", short + "2", long + "3", short + "4", "other")
    assert groups(path, 9) == [[0, 2, 1, 3, 4]]


def test_a_group_that_does_not_fit_begins_a_chunk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "1", "2", *("g" * 500 + str(n) for n in range(3)))
    assert groups(path, 4) == [[0, 1], [2, 3, 4]]


def test_a_long_conversation_does_not_make_a_long_chunk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(str(n) * (CHUNK_BYTES // 2) for n in range(4)))
    assert groups(path, 100) == [[0], [1], [2], [3]]
    half, whole = "x" * (CHUNK_BYTES // 2), "y" * (CHUNK_BYTES + 1)
    path = write(tmp_path / "a.jsonl", whole, half, half + "1", "2", "3")
    assert sorted(groups(path, 100)) == [[0], [1], [2, 3, 4]]


def test_tools_are_part_of_the_beginning(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", "q" * 200, tools=[{"name": "t" * 200}]).read_text()
    two = write(tmp_path / "b.jsonl", "q" * 200).read_text()
    both = tmp_path / "c.jsonl"
    both.write_text(one + two + one)
    assert groups(both, 9) == [[0, 2, 1]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab", max_size=3).map(lambda t: t * 70), max_size=40),
    st.integers(1, 9),
)
def test_a_plan_deals_out_everything_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk_size: int
) -> None:
    path = write(tmp_path_factory.mktemp("plan") / "a.jsonl", *texts)
    if not texts:
        path.write_text("")
    plan = make_plan(path, "d", chunk_size, None)
    assert sorted(plan.order.tolist()) == list(range(len(texts)))
    sizes = np.diff(plan.chunks)
    assert sizes.sum() == len(texts) and (sizes > 0).all() and (sizes <= chunk_size).all()
    with path.open("rb") as file:
        found = [plan.read(n, file)["conversations"][0]["content"] for n in range(len(texts))]
    assert found == texts


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *("x" * 300 + str(n % 2) for n in range(9)))
    plan = make_plan(path, "d", 4, 7)
    save_plan(plan, tmp_path / "a.plan")
    again = load_plan(tmp_path / "a.plan", path, "d")
    assert again is not None
    assert (again.total, again.digest) == (9, "d")
    assert [again.name(c) for c in range(len(again))] == [plan.name(c) for c in range(len(plan))]
    assert len(again.order) == 7
    other = make_plan(path, "other content", 4, 7)
    assert other.name(0) != plan.name(0)
    assert make_plan(path, "d", 3, 7).name(0) != plan.name(0)  # of other conversations


def test_a_plan_that_is_not_what_was_written_is_made_again(tmp_path: Path) -> None:
    path, saved = write(tmp_path / "a.jsonl", *"abc"), tmp_path / "a.plan"
    save_plan(make_plan(path, "d", 2, None), saved)
    whole = saved.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for damaged in (b"", whole[: len(whole) // 2], bytes(len(whole)), b"{}", bytes(flipped)):
        saved.write_bytes(damaged)
        assert load_plan(saved, path, "d") is None
    saved.write_bytes(whole)
    assert load_plan(saved, path, "d") is not None and load_plan(saved, path, "other") is None
    saved.unlink()
    assert load_plan(saved, path, "d") is None


def test_bad_lines_are_named_when_they_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "good")
    good = path.read_bytes()
    path.write_bytes(good + b"\n" + b"{broken\n" + b'{"id": "\xff"}\n' + b"[1]\n" + good)
    plan = make_plan(path, "d", 9, None)
    assert plan.total == 5
    with path.open("rb") as file:
        assert plan.read(0, file)["id"] == "0"
        for number, why in [
            (1, r"a\.jsonl:3: unexpected character|a\.jsonl:3: "),
            (2, r"a\.jsonl:4: "),
            (3, r"a\.jsonl:5: a list where an object"),
            (4, r"a\.jsonl:6: an earlier line has the id 0"),
        ]:
            with pytest.raises(BadRecord, match=why):
                plan.read(number, file)
