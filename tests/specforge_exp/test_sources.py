"""Every kind of source, read from real small files."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specforge_exp.config import Source
from specforge_exp.data import files
from specforge_exp.data.files import Rejected
from specforge_exp.data.sources import (
    depends_on,
    from_first_user,
    hub_name,
    load,
    local_files,
    read,
)
from specforge_exp.errors import InputError


def conversation(text: str, **extra: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Fine."}]
    return {"conversations": messages, **extra}


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def texts(source: Source) -> list[str]:
    found = [item for item in read(source) if not isinstance(item, Rejected)]
    return [record["conversations"][0]["content"] for record in found]


def set_aside(source: Source) -> list[Rejected]:
    return [item for item in read(source) if isinstance(item, Rejected)]


def test_bad_lines_are_set_aside_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(conversation("one")).encode()
    lines = [good, b"{broken", b"", b"[1]", b'{"text": "x"}', b'"\xff"', good.replace(b"one", b"6")]
    path.write_bytes(b"\n".join(lines) + b"\n")
    source = Source(str(path))
    assert texts(source) == ["one", "6"]
    found = set_aside(source)
    assert [item.where for item in found] == [f"{path}:{n}" for n in (2, 4, 5, 6)]
    kinds = ["not JSON", "a list where", "no `conversations`", "not UTF-8"]
    assert all(item.reason.startswith(k) for item, k in zip(found, kinds, strict=True))
    assert found[0].raw == "{broken"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": [{"role": "assistant", "content": "Hi."}]}, "no user message"),
        ({"conversations": [{"role": "user", "content": "  "}]}, "no user message"),
        ({"conversations": [{"role": "wizard", "content": "Hi."}]}, "unknown role 'wizard'"),
        ({"conversations": "user: hi"}, "`conversations` is not a list"),
        ({"id": "a", **conversation("\ud83d")}, "half of a surrogate pair"),
        (conversation("\ud83d"), "half of a surrogate pair"),
    ],
)
def test_what_is_no_conversation(tmp_path: Path, record: object, reason: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", record)
    (found,) = read(Source(str(path)))
    assert isinstance(found, Rejected)
    assert found.reason.startswith(reason)
    assert found.where == f"{path}:1"


def test_common_shapes_are_accepted(tmp_path: Path) -> None:
    pairs = [{"from": "human", "value": "pairs"}, {"from": "gpt", "value": "Yes."}]
    chat = {"messages": [{"role": "user", "content": "messages"}]}
    path = write_lines(tmp_path / "a.jsonl", "\ufeff" + json.dumps({"conversations": pairs}), chat)
    assert texts(Source(str(path))) == ["pairs", "messages"]
    assert load(Source(str(path)), "test")[0]["conversations"][1] == {
        "role": "assistant",
        "content": "Yes.",
    }


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", conversation("2"))
    (tmp_path / "a.json").write_text(json.dumps([conversation("0"), 5, conversation("1")]))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl.gz").write_bytes(
        gzip.compress(json.dumps(conversation("3")).encode() + b"\n5")
    )
    (tmp_path / "notes.txt").write_text("not data")
    write_lines(tmp_path / "a.rejected.jsonl", conversation("ours, not data"))
    for hidden in (".ipynb_checkpoints/b-checkpoint.jsonl", ".c.jsonl"):  # an editor's older copies
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / hidden, conversation("as it was before"))
    source = Source(str(tmp_path))
    assert [path.name for path in local_files(source)] == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert texts(source) == ["0", "1", "2", "3"]
    places = [f"{tmp_path / 'a.json'}#1", f"{tmp_path / 'sub' / 'c.jsonl.gz'}:2"]
    assert [item.where for item in set_aside(source)] == places


def test_what_may_be_data_and_is_not_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not what lies beside data: words on it, hidden files, what prep set aside."""
    names = ["README.md", ".gitattributes", ".cache/a.csv", "LICENSE", "x.rejected.jsonl"]
    for name in (*names, "in/a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    with pytest.raises(InputError, match=r"holds no \.jsonl or .* file, only in/a\.csv$"):
        texts(Source(str(tmp_path)))
    write_lines(tmp_path / "a.jsonl", conversation("1"))
    assert texts(Source(str(tmp_path))) == ["1"]
    assert f"{tmp_path}: not read: in/a.csv; what is read ends in .jsonl" in caplog.text
    for name in ("b.jsonl.zst", "C.JSONL", "d.txt"):
        (tmp_path / name).write_text("a")
    texts(Source(str(tmp_path)))
    assert "not read: C.JSONL, b.jsonl.zst, d.txt and 1 more" in caplog.text
    (tmp_path / "in" / "a.csv").unlink()
    for name in ("b.jsonl.zst", "C.JSONL", "d.txt"):
        (tmp_path / name).unlink()
    caplog.clear()
    assert texts(Source(str(tmp_path))) == ["1"] and not caplog.records


def test_json_may_hold_lines_or_records_by_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.json", conversation("1"), conversation("2"))
    (tmp_path / "named.json").write_text(json.dumps({"a": conversation("3")}))
    (tmp_path / "one.json").write_text(json.dumps(conversation("4", meta={"language": "en"})))
    (tmp_path / "zero.json").write_text("{}")
    assert texts(Source(str(tmp_path))) == ["1", "2", "3", "4"]
    assert [item.where for item in set_aside(Source(str(tmp_path)))] == [
        f"{tmp_path / 'zero.json'}#0"
    ]


@pytest.mark.parametrize("before", ["\ufeff", " \n", "\ufeff\n"])
def test_a_list_may_begin_with_a_mark_or_with_white_space(tmp_path: Path, before: str) -> None:
    (tmp_path / "a.json").write_text(before + json.dumps([conversation("1"), conversation("2")]))
    assert texts(Source(str(tmp_path))) == ["1", "2"]


def test_a_line_that_is_nested_too_deep_is_set_aside(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "[" * 200_000, conversation("1"))
    assert texts(Source(str(path))) == ["1"]
    (bad,) = set_aside(Source(str(path)))
    assert bad.where == f"{path}:1" and bad.reason.startswith("not JSON")


RECORDS = st.lists(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    )
)


@given(RECORDS, st.integers(1, 9), st.sampled_from([None, 1]), st.sampled_from(["", "\ufeff \n"]))
def test_a_list_is_read_piece_by_piece(
    records: list[Any], chunk: int, indent: int | None, before: str
) -> None:
    data = (before + json.dumps(records, ensure_ascii=chunk % 2 == 0, indent=indent)).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_CHARACTERS", chunk)
        found = list(files.parse_list("a.json", io.BytesIO(data + b" \n")))
        assert found == [(f"a.json#{number}", record) for number, record in enumerate(records)]
        for broken in (data[:-1], data + b"[]", data.replace(b"[", b"[,", 1)):
            with pytest.raises(InputError, match=r"a\.json is not JSON"):
                list(files.parse_list("a.json", io.BytesIO(broken)))


def test_a_list_loses_only_the_record_with_broken_bytes(tmp_path: Path) -> None:
    good = json.dumps(conversation("one")).encode()
    data = b"[" + good + b"," + good.replace(b"one", b"\xff") + b"," + good + b"]"
    (tmp_path / "a.json").write_bytes(data)
    source = Source(str(tmp_path / "a.json"))
    assert texts(source) == ["one", "one"]
    (lost,) = set_aside(source)
    assert lost.where.endswith("a.json#1")
    assert lost.reason.endswith("its text is no valid Unicode")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {"id": "a", "conversations": [{"role": "user", "content": "x", "name": "Ann"}], "n": b"1"},
        {"id": None, "conversations": [{"role": "user", "content": "y"}], "n": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read(Source(str(tmp_path / "a.parquet")))
    assert isinstance(first, dict)
    assert first == {"id": "a", "conversations": rows[0]["conversations"]}
    assert isinstance(second, dict)
    assert second["conversations"] == [{"role": "user", "content": "y"}]
    assert second["id"]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="has the columns text"):
        list(read(Source(str(tmp_path / "b.parquet"))))
    (tmp_path / "c.parquet").write_bytes(b"PAR0")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        list(read(Source(str(tmp_path / "c.parquet"))))
    torn = bytearray((tmp_path / "a.parquet").read_bytes())
    torn[4:40] = b"\xff" * 36  # the header of the first page
    (tmp_path / "d.parquet").write_bytes(torn)
    text = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"),
                                            pyarrow.py_buffer(b"\xff"))  # fmt: skip
    parquet.write_table(pyarrow.table({"messages": text}), tmp_path / "e.parquet")
    for name in ("d.parquet", "e.parquet"):
        unreadable = pytest.raises(InputError, match=f"{name} is not a readable Parquet .* again")
        with (tmp_path / name).open("rb") as file, unreadable:
            list(files.parse(name, file, files.Columns("messages id")))


def test_places_and_empty_texts_of_a_table(tmp_path: Path) -> None:
    """Rows are counted through all batches; nulls leave a record, empty texts stay."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    asks = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "name": "A"}]
    table = pyarrow.Table.from_pylist([{"messages": asks}] * files.BATCH_ROWS + [{"messages": []}])
    parquet.write_table(table, tmp_path / "a.parquet")
    *good, bad = read(Source(str(tmp_path / "a.parquet")))
    assert isinstance(bad, Rejected) and bad.where.endswith(f"#{files.BATCH_ROWS}")
    assert isinstance(good[0], dict) and good[0]["conversations"] == asks


def test_hub_reads_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *(conversation(str(n), id=str(n)) for n in range(3)))
    write_lines(folder / "test.jsonl", conversation("held"))
    assert texts(Source(f"hub:{folder}", skip=1)) == ["1", "2"]
    assert texts(Source(f"hub:{folder}:test")) == ["held"]
    with pytest.raises(InputError, match=r"Available splits.*check the id, the configuration"):
        list(read(Source(f"hub:{folder}:nothing")))


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name("squad") == ("squad", "", "")
    assert hub_name("o/n:test") == ("o/n", "", "test")
    assert hub_name("o/n/some_config:test") == ("o/n", "some_config", "test")
    assert hub_name("o/n/a/b.jsonl.gz") == ("o/n", "a/b.jsonl.gz", "")
    assert hub_name("/o/n/m:test") == ("/o/n/m", "", "test")
    with pytest.raises(InputError, match=r"hub:o/n/a\.json:test names a file, which has no split"):
        hub_name("o/n/a.json:test")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "n" / "in").mkdir(parents=True)
    write_lines(tmp_path / "o" / "n" / "in" / "a.jsonl", conversation("1"), "bad")
    source = Source("hub:o/n/in/a.jsonl")
    assert texts(source) == ["1"]
    assert set_aside(source)[0].where == "hub:o/n/in/a.jsonl:2"


def test_a_hub_that_cannot_be_reached_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"offline: .*hub:o/n/a.jsonl .*data.path=<file>"):
        list(read(Source("hub:o/n/a.jsonl")))


def test_what_a_package_lacks_is_not_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As httpx says it, on the way to the hub, where a SOCKS proxy is set."""

    def without_socks(*_: object, **__: object) -> None:
        raise ImportError("the 'socksio' package is not installed")

    monkeypatch.setattr("datasets.load_dataset", without_socks)
    with pytest.raises(InputError, match=r"o/n cannot be read.*'socksio' package is not"):
        list(read(Source("hub:o/n")))


def test_synthetic() -> None:
    first = texts(Source("synthetic:train", limit=6))
    assert len(first) == 6
    assert texts(Source("synthetic:train", skip=2, limit=4)) == first[2:]
    stories = load(Source("synthetic:bench/stories", limit=2), "test")
    assert {record["category"] for record in stories} == {"stories"}
    with pytest.raises(InputError, match="needs a limit"):
        list(read(Source("synthetic:train")))
    with pytest.raises(InputError, match="synthetic:tarin: unknown split"):
        list(read(Source("synthetic:tarin", limit=1)))


def test_skip_and_limit_count_conversations(tmp_path: Path) -> None:
    lines = ["bad", conversation("0"), conversation("1"), "bad", conversation("2"), "bad"]
    path = write_lines(tmp_path / "a.jsonl", *lines)
    assert texts(Source(str(path), skip=1, limit=1)) == ["1"]
    assert len(set_aside(Source(str(path), limit=1))) == 1
    assert len(set_aside(Source(str(path), skip=1))) == 2
    with pytest.raises(InputError, match=r"3 conversations, so skip=3 leaves none .*2 not JSON"):
        list(read(Source(str(path), skip=3)))


def test_answers_before_anyone_asked_are_left_out() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "u"},
    ]
    record = {"id": "1", "conversations": messages}
    assert [m["role"] for m in from_first_user(record)["conversations"]] == ["system", "user"]
    asked = {"id": "2", "conversations": messages[2:]}
    assert from_first_user(asked) is asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "does not exist; a data path is a .jsonl"),
        ("s3:bucket", r"does not exist; .*hub:<id>"),
        ("a.txt", "is not one of: .jsonl"),
        ("empty", "holds no .jsonl"),
        ("broken.json", "is not JSON: .*line 1 column 2"),
        ("number.json", "holds a int, not a list"),
        ("broken.jsonl.gz", "is a broken gzip file"),
        ("torn.jsonl.gz", "is a broken gzip file"),
        ("nothing.jsonl", r"test: .*nothing.jsonl \(format conversations\) is empty"),
        ("bad.jsonl", r"is empty: 1 not JSON; first .*bad.jsonl:1"),
    ],
)
def test_unreadable_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    contents = {
        "a.txt": b"x", "broken.json": b"{]", "number.json": b"5", "nothing.jsonl": b"\n",
        "bad.jsonl": b"{", "broken.jsonl.gz": gzip.compress(b"{}\n" * 99)[:-9],
        "torn.jsonl.gz": gzip.compress(b"{}")[:10] + b"\x07" + bytes(20),
    }  # fmt: skip
    for file, data in contents.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=message):
        load(Source(name), "test")


def test_what_a_source_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that stand in for the hub, too, but for what a download leaves in them."""
    monkeypatch.chdir(tmp_path)
    files = [Path("o/n/README.md"), Path("o/n/a1.jsonl"), Path("o/n/a2.jsonl")]
    for file in (*files, Path("o/n/.cache/a.jsonl.metadata"), Path("o/m/b.jsonl")):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_lines(file, conversation("1"))
    for path in ("hub:o/n", "hub:o/n:test", "hub:o/n/config:test"):
        assert depends_on(Source(path)) == files
    assert depends_on(Source(f"hub:{tmp_path}/o/m:test")) == [tmp_path / "o/m/b.jsonl"]
    assert depends_on(Source("hub:o/n/a{1,2,3}.jsonl")) == files[1:]
    assert depends_on(Source("hub:o/k")) == depends_on(Source("synthetic:train")) == []
    assert depends_on(Source("o/m")) == [Path("o/m/b.jsonl")]
