"""Rows of text: fixed lengths, every token predicted once, and the same from any place on."""

import json
import shutil
from collections.abc import Iterator
from itertools import islice, pairwise
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from tokenizers import Tokenizer

from specforge_exp.config import Config
from specforge_exp.config.causal import PretrainConfig, TextSource
from specforge_exp.data.stream import (
    RowStream,
    Tokens,
    Workers,
    documents,
    encode,
    held_out,
    text_digest,
    texts,
)
from specforge_exp.errors import InputError
from specforge_exp.stages.pretrain import begin, tokens_of

SIZES = (1, 3, 40, 7, 200, 2, 25, 90, 11)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    backend = (Path(TINY.path) / "tokenizer.json").read_text()
    return Tokens(backend, 0)


@pytest.fixture
def sources(tmp_path: Path) -> list[TextSource]:
    """Two files of words that say where they come from; the second weighs a third."""
    made = []
    for name, weight in (("a", 3.0), ("b", 1.0)):
        path = tmp_path / f"{name}.jsonl"
        lines = [
            {"text": " ".join(f"{name}{n} {k}" for k in range(size))}
            for n, size in enumerate(SIZES)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        made.append(TextSource(str(path), weight=weight))
    return made


def stream(
    sources: list[TextSource], tokens: Tokens, processes: int = 0, held: int = 2
) -> RowStream:
    return RowStream(sources, tokens, 32, held, processes)


def rows(made: RowStream, steps: range) -> list[list[tuple[Any, ...]]]:
    return [[(row.ids.tolist(), row.lengths) for row in made.take(s, 3)] for s in steps]


def test_a_text_that_is_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\ncaf\xc3\xa9\n")
    assert list(texts(TextSource(str(path)), 0)) == ["one\n", "caf\xe9\n"]
    path.write_bytes(b"one\n\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"a\.txt:3 is not UTF-8"):
        list(texts(TextSource(str(path)), 0))


def test_rows_are_whole_and_begin_where_the_last_one_ended(
    sources: list[TextSource], tokens: Tokens
) -> None:
    """Put together again, a source's rows are its documents, pass after pass."""
    from tokenizers import Tokenizer

    (taken,) = [stream(sources[:1], tokens).take(0, 200)]
    assert {len(row.ids) for row in taken} == {32}
    assert all(sum(row.lengths) == 32 for row in taken)
    tokenizer = Tokenizer.from_str(tokens.backend)
    documents = [[*tokenizer.encode(t).ids, 0] for t in texts(sources[0], 2)]
    pieces: list[list[int]] = []
    for row in taken:
        at = 0
        for number, length in enumerate(row.lengths):
            piece = row.ids[at : at + length].tolist()
            goes_on = not number and pieces and pieces[-1][-1] != 0
            if goes_on:
                assert piece[0] == pieces[-1][-1]  # seen again, so that what follows is predicted
                pieces[-1] += piece[1:]
            else:
                pieces.append(piece)
            at += length
    assert len(pieces) > 2 * len(documents)
    for number, piece in enumerate(pieces[:-1]):
        assert piece == documents[number % len(documents)]


def test_any_place_gives_the_rows_that_follow(sources: list[TextSource], tokens: Tokens) -> None:
    """Killed after any step: another process with other workers goes on with the same bytes."""
    whole = stream(sources, tokens)
    expected, states = [], []
    for step in range(12):
        expected += rows(whole, range(step, step + 1))
        states.append(whole.state(step + 1))
    for done, processes in ((1, 2), (5, 0), (11, 1)):
        later = stream(sources, tokens, processes)
        later.restore(states[done - 1])
        assert rows(later, range(done, 12)) == expected[done:]


@pytest.mark.parametrize(("first", "left"), [(0, [0, 1]), (1, [1]), (2, [])])
def test_a_pass_that_is_gone_on_with_is_followed_by_whole_ones(
    first: int, left: list[int], tmp_path: Path
) -> None:
    """Also where nothing, or nothing but an empty document, is left of it."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("held", "one", "")))
    found = islice(documents(TextSource(str(path)), first, 1), len(left) + 4)
    assert list(found) == [(n, ("one", "")[n]) for n in (*left, 0, 1, 0, 1)]


def test_workers_change_nothing(sources: list[TextSource], tokens: Tokens) -> None:
    alone, together = (rows(stream(sources, tokens, n), range(10)) for n in (0, 2))
    assert alone == together


@pytest.mark.parametrize("asked", [0, 1])
def test_a_worker_that_died_is_said(tokens: Tokens, asked: int) -> None:
    """Before it was asked, and with a question that it has not read."""
    ours, theirs = Pipe()

    def blocks() -> Iterator[list[tuple[int, str]]]:
        for number in range(2):
            if number == asked:
                theirs.close()
            yield [(number, "one")]

    with pytest.raises(InputError, match=r"has died; run the same command to continue"):
        list(Workers(tokens, 1, [ours]).encoded(blocks()))


def test_sources_come_by_weight(sources: list[TextSource], tokens: Tokens) -> None:
    made = stream(sources, tokens)
    for step in range(8):
        made.take(step, 5)
        assert abs(made.places[0].rows - 3 * made.places[1].rows) <= 3


def test_held_out_documents_are_in_no_row(sources: list[TextSource], tokens: Tokens) -> None:
    shard = held_out(PretrainConfig(sources=sources, eval_documents=3), tokens, 32)
    lengths = [b - a for a, b in pairwise(shard.offsets.tolist())]
    assert max(lengths) <= 32 and int(shard.turns.sum()) == sum(lengths)
    from tokenizers import Tokenizer

    decode = Tokenizer.from_str(tokens.backend).decode
    assert "a2 39" in decode(shard.ids.tolist()) and "a3 0" not in decode(shard.ids.tolist())
    trained = decode(
        [i for row in stream(sources, tokens, held=3).take(0, 60) for i in row.ids.tolist()]
    )
    assert "a3 0" in trained and "a2 " not in trained and "b1 " not in trained


@pytest.mark.parametrize("name", ["x.txt", "x.parquet", "folder"])
def test_files_of_every_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "x.txt":
        path.write_text("one\nline\n\n\ntwo\n")
    elif name == "folder":
        path.mkdir()
        (path / "1.txt").write_text("one\nline\n")
        (path / "2.jsonl").write_text('{"text": "two\\n"}\n')
        (path / ".1.txt").write_text("an older copy\n")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": ["one\nline\n", "two\n"], "id": [1, 2]}), path)
    assert list(texts(TextSource(str(path)), 0)) == ["one\nline\n", "two\n"]
    assert list(texts(TextSource(str(path)), 1)) == ["two\n"]


def test_other_text_is_another_source(tmp_path: Path) -> None:
    """What a run's fingerprint has of it; the hub's and templates stand for themselves."""
    source = TextSource(str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    first = text_digest(source)
    assert text_digest(source) == first
    (tmp_path / "a.txt").write_text("two")
    assert text_digest(source) != first and text_digest(TextSource("hub:o/n")) == "hub:o/n"
    stand_in = TextSource(f"hub:{tmp_path}:train")
    second = text_digest(stand_in)
    (tmp_path / "a.txt").write_text("one")
    assert text_digest(stand_in) != second


def test_a_stream_of_the_hub(tmp_path: Path) -> None:
    """A local folder in the hub's layout stands in for the hub."""
    (tmp_path / "train.jsonl").write_text("".join(f'{{"body": "{n}"}}\n' for n in range(5)))
    source = TextSource(f"hub:{tmp_path}", field="body")
    assert list(texts(source, 3)) == ["3", "4"]


def test_refusals_name_the_source(
    sources: list[TextSource], tokens: Tokens, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "held out"}\n{"text": ""}\n{"text": ""}\n')
    for given, held in ((sources, 9), ([TextSource(str(empty))], 1)):
        with pytest.raises(InputError, match=f"no text beyond the first {held} documents, which"):
            stream(given, tokens, held=held).take(0, 1)
    with pytest.raises(InputError, match=r"a.jsonl:1 has no text in `body` \(there is: text\)"):
        list(texts(TextSource(sources[0].path, field="body"), 0))
    with pytest.raises(InputError, match=r"nothing is no \.jsonl"):
        list(texts(TextSource(str(tmp_path / "nothing")), 0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("text\none\n")
    with pytest.raises(InputError, match=r"nor a folder of them, only a\.csv is in it; a data set"):
        list(texts(TextSource(str(tmp_path / "in")), 0))


def test_what_a_folder_has_besides_text_is_named(
    cfg: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "README.md", "b.csv"):
        (tmp_path / name).write_text("one")
    cfg.pretrain.sources, cfg.max_steps = [TextSource(str(tmp_path))], 1
    assert begin(cfg, 1) is None
    assert caplog.messages == [
        f"{tmp_path}: not read: b.csv; what is read ends in .jsonl, .json, .parquet, .jsonl.gz, "
        ".json.gz, .txt"
    ]


def test_documents_are_whole_whatever_the_tokenizer_asks_for(
    cfg: Config, tokens: Tokens, tmp_path: Path
) -> None:
    """Some tokenizer.json cut every text, or fill it up to the longest beside it."""
    tokenizer = Tokenizer.from_file(str(Path(TINY.path) / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=0, pad_token=tokenizer.id_to_token(0))
    folder = tmp_path / "model"
    shutil.copytree(TINY.path, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    cfg.model.path = str(folder)
    texts = ["a text of more than five tokens, by far", "hi"]
    made, plain = tokens_of(cfg), Tokenizer.from_str(tokens.backend)
    found = encode(Tokenizer.from_str(made.backend), made.end, texts)
    wanted = encode(plain, made.end, texts)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in wanted]
