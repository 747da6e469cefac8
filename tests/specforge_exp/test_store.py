"""Every result exactly once, whatever ends the process in between."""

import errno
import json
from pathlib import Path

import pytest
from instant_engine import Instant, answer_all, make_store, merged
from test_plan import write

from specforge_exp.errors import InputError
from specforge_exp.generation import store as module


def results(count: int) -> list[str]:
    return [str(n) for n in range(count)]


def ids(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["id"] for line in lines]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten conversations of which every third begins alike, so that the plan reorders them."""
    return write(tmp_path / "train.jsonl", *(f"{n % 3}" * 200 + str(n) for n in range(10)))


def test_counts_say_what_became_of_each() -> None:
    cut = {"finish_reasons": ["stop", "length"], "generated_tokens": 9}
    both = module.Counts()
    for results in ([cut, {"error": "x"}], [{"finish_reasons": ["stop"], "generated_tokens": 4}]):
        counts = module.Counts()
        for result in results:
            counts.take(result)
        both.add(counts)
    assert vars(both) == {"done": 2, "failed": 1, "cut": 1, "tokens": 13}


def test_results_come_in_the_order_of_the_source(tmp_path: Path, source: Path) -> None:
    store = make_store(tmp_path / "out", source)
    assert store.plans[0].order.tolist() != list(range(10))
    answer_all(store, Instant())
    done, failed = merged(store)
    assert ids(done) == results(10) and not failed
    assert all("answer to" in json.loads(x)["conversations"][1]["content"] for x in done)
    assert store.counts.done == 10 and store.counts.tokens == 40
    names = sorted(path.name for path in store.shards.iterdir())
    assert len(names) == 3 and all(name.endswith(".jsonl") for name in names)
    store.remove()
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["done.jsonl", "failed.jsonl", "shards"]


def test_a_source_that_is_replaced_is_read_as_it_was(tmp_path: Path, source: Path) -> None:
    store = make_store(tmp_path / "out", source)
    write(tmp_path / "new", *(f"another {n}" for n in range(10))).replace(source)
    answer_all(store, Instant())
    done, failed = merged(store)
    assert ids(done) == results(10) and not failed and b"another" not in b"".join(done)


def test_samples_follow_one_another(tmp_path: Path, source: Path) -> None:
    store = make_store(tmp_path / "out", source, samples=3, most=4)
    engine = Instant()
    answer_all(store, engine)
    done, _ = merged(store)
    assert ids(done) == [f"{n}#{sample}" for n in range(4) for sample in range(3)]
    assert len({request.seed for request in engine.asked}) == 12
    assert store.total == 12 and store.plans[0].total == 10


def test_what_a_kill_leaves_is_continued(tmp_path: Path, source: Path) -> None:
    """Any prefix of the bytes of a journal: whole lines count, the torn one is asked again."""
    store = make_store(tmp_path / "out", source, chunk_size=10)
    chunk = next(store.chunks())
    for place in range(5):
        store.add(chunk, place, result_of(store.read(chunk, place)))
    store.close()
    journal = next(store.shards.glob("*.open"))
    content = journal.read_bytes()
    for size in range(0, len(content) + 1, 37):
        journal.write_bytes(content[:size])
        again = make_store(tmp_path / "out", source)
        kept = next(again.chunks()).results
        again.close()
        assert sorted(kept) == list(range(content[:size].count(b"\n")))
    again = make_store(tmp_path / "out", source)
    answer_all(again, engine := Instant())
    assert len(engine.asked) == 10 - len(kept)
    assert ids(merged(again)[0]) == results(10)
    assert again.counts.done == 10
    shard = next(again.shards.glob("*.jsonl"))
    again.close()
    shard.with_name(shard.name + ".open").write_bytes(content)  # killed before it was removed
    assert make_store(tmp_path / "out", source).counts.done == 10


def test_what_came_in_any_order_is_continued(tmp_path: Path, source: Path) -> None:
    """Each result at its place, and what is missing is asked for."""
    store = make_store(tmp_path / "out", source, chunk_size=10)
    chunk = next(store.chunks())
    for place in (7, 2):
        store.add(chunk, place, result_of(store.read(chunk, place)))
    store.close()
    again = make_store(tmp_path / "out", source)
    assert next(again.chunks()).missing() == [0, 1, 3, 4, 5, 6, 8, 9]
    answer_all(again, Instant())
    assert ids(merged(again)[0]) == results(10)


def test_a_changed_shard_is_no_result(tmp_path: Path, source: Path) -> None:
    """Also where it can be read; what looks like a failure within a result is none."""
    store = make_store(tmp_path / "out", source)
    inner = {"role": "user", "content": "", "tool_calls": [{"function": {"error": 1}, "id": "1"}]}
    for chunk in store.chunks():
        for place in chunk.missing():
            record = store.read(chunk, place) | {"note": {"error": 1}, "more": [inner]}
            store.add(chunk, place, result_of(record))
    assert ids(merged(store)[0]) == results(10)
    shard = next(store.shards.glob("*.jsonl"))
    shard.write_bytes(shard.read_bytes().replace(b"stop", b"stap", 1))
    with pytest.raises(InputError, match=r"jsonl: it was changed.*remove the file: only its"):
        merged(store)


def test_a_changed_line_of_a_journal_is_named(tmp_path: Path, source: Path) -> None:
    """Also where it is a result still; lines of an older version have no digits and count."""
    store = make_store(tmp_path / "out", source, chunk_size=10)
    chunk = next(store.chunks())
    for place in range(3):
        store.add(chunk, place, result_of(store.read(chunk, place)))
    store.close()
    journal = next(store.shards.glob("*.open"))
    lines = journal.read_bytes().splitlines(True)
    journal.write_bytes(lines[0] + lines[1].replace(b"stop", b"stap") + lines[2])
    with pytest.raises(InputError, match=r"open:2: it was changed.*remove the file: only its"):
        make_store(tmp_path / "out", source)
    older = [line[:2] + line[line.index(b"{") :] for line in lines]
    journal.write_bytes(b"".join(older))
    assert make_store(tmp_path / "out", source).counts.done == 3


def test_a_shard_without_its_line_in_the_manifest_counts(tmp_path: Path, source: Path) -> None:
    store = make_store(tmp_path / "out", source)
    answer_all(store, Instant())
    store.close()
    manifest = tmp_path / "out" / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    again = make_store(tmp_path / "out", source)
    assert again.counts == store.counts
    assert list(again.chunks()) == []
    again.close()
    third = make_store(tmp_path / "out", source)
    assert third.counts == store.counts


def test_a_full_disk_tears_no_line(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write that does not fit is taken back, and said; the rest is done afterwards."""
    store = make_store(tmp_path / "out", source, chunk_size=10)
    chunk = next(store.chunks())
    whole = module.append

    class Full:
        """A file on a disk with room for three bytes more."""

        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, content: bytes) -> int:
            return self.file.write(content[:3])  # type: ignore[attr-defined, no-any-return]

        def fileno(self) -> int:
            return self.file.fileno()  # type: ignore[attr-defined, no-any-return]

    store.add(chunk, 0, result_of(store.read(chunk, 0)))
    with monkeypatch.context() as patch:
        patch.setattr(module, "append", lambda file, content: whole(Full(file), content))
        with pytest.raises(OSError, match="No space left") as error:
            store.add(chunk, 1, result_of(store.read(chunk, 1)))
    assert error.value.errno == errno.ENOSPC
    store.add(chunk, 2, result_of(store.read(chunk, 2)))  # of another task, before the run ends
    store.close()
    again = make_store(tmp_path / "out", source)
    answer_all(again, engine := Instant())
    assert len(engine.asked) == 8
    assert ids(merged(again)[0]) == results(10)


def test_a_result_twice_counts_once(tmp_path: Path, source: Path) -> None:
    store = make_store(tmp_path / "out", source, chunk_size=10)
    chunk = next(store.chunks())
    for _ in range(2):
        store.add(chunk, 3, result_of(store.read(chunk, 3)))
    assert store.counts.done == 1


def result_of(record: dict[str, object]) -> dict[str, object]:
    return {**record, "finish_reasons": ["stop"], "generated_tokens": 4}
