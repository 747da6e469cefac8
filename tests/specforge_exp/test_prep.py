"""prep: what goes into train.jsonl and eval.jsonl, and what happens when it runs again."""

import json
import logging
import os
import subprocess
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm

from specforge_exp import paths
from specforge_exp.config import (
    REPOSITORY,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    PathsConfig,
    Source,
)
from specforge_exp.data.conversations import read_jsonl
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.errors import InputError
from specforge_exp.stages import prep as stage
from specforge_exp.stages.prep import prep

Turns = list[dict[str, str]]


def turns(*texts: str) -> Turns:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def write(path: Path, *conversations: Turns | str) -> Source:
    lines = [c if isinstance(c, str) else json.dumps({"conversations": c}) for c in conversations]
    path.write_text("\n".join(lines) + "\n")
    return Source(str(path))


def config(tmp_path: Path, train: list[Source], **data: Any) -> Config:
    return Config(
        run_name="t",
        model=ModelConfig(name="m", path="x"),
        data=DataConfig(name="d", train=train, **data),
        loss=LossConfig(name="l", lambda_ce=1.0),
        draft=Eagle3Config(name="d"),
        paths=PathsConfig(str(tmp_path / "datasets"), str(tmp_path / "checkpoints")),
    )


def openings(folder: Path, name: str) -> list[str]:
    return [r["conversations"][0]["content"] for r in read_jsonl(folder / f"{name}.jsonl")]


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "a.jsonl", turns("three", "3")
    cfg = config(tmp_path, [write(file, turns("one", "1"), turns("two", "2"))])
    monkeypatch.setattr(stage, "report", lambda *_: write(file, other))
    with pytest.raises(InputError, match=r"a\.jsonl has changed while it was read; run the same"):
        prep(cfg)


def test_everything_read_is_accounted_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = write(tmp_path / "a.jsonl", turns("1", "x"), "{broken", turns("2"), turns("1", "x"))
    second = write(tmp_path / "b.jsonl", turns("2"), [{"role": "assistant", "content": "hello"}])
    held_out = write(tmp_path / "e.jsonl", turns("1", "another answer"), turns("3"), "also broken")
    with caplog.at_level(logging.INFO):
        folder = prep(config(tmp_path, [first, second], eval=[held_out]))
    assert openings(folder, "train") == ["1", "2"]
    assert openings(folder, "eval") == ["3"]
    rejected = [json.loads(x) for x in (folder / "train.rejected.jsonl").read_text().splitlines()]
    assert [r["where"] for r in rejected] == [f"{first.path}:2", f"{second.path}:2"]
    assert rejected[0]["raw"] == "{broken"
    assert rejected[1]["reason"] == "no user message"
    assert (folder / "eval.rejected.jsonl").exists()
    assert (
        "train: read 6 = kept 2 + rejected 2 (1 not JSON, 1 no user message) + duplicate 2"
        in caplog.text
    )
    assert (
        "eval: read 3 = kept 1 + rejected 1 (1 not JSON) + asked in training too 1" in caplog.text
    )


def test_bad_input_costs_no_more_than_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def line(name: str, text: str) -> bytes:
        return json.dumps({"id": name, "conversations": turns(text, "x")}).encode()

    long = "word " * 100_000
    lines = [
        line("a", "1"),
        line("b", "2").replace(b"2", b"\xff\xfe"),
        line("c", "3")[:-1],
        line("d", long),
        line("a", "5"),
        line("e", "1"),
        b'{"id": "f", "conversations": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"id": "g", "messages": [{"role": "user", "content": "7"}], "tools": "[oops"}',
        b'"\\ud83d"',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.INFO):
        folder = prep(config(tmp_path, [Source(str(tmp_path / "a.jsonl"))], split_eval=0.0))
    assert openings(folder, "train") == ["1", long, "5"]
    first, _, again = (r["id"] for r in read_jsonl(folder / "train.jsonl"))
    assert first == "a"
    assert again.startswith("a-")
    aside = [json.loads(x) for x in (folder / "train.rejected.jsonl").read_text().splitlines()]
    assert [int(r["where"].rpartition(":")[2]) for r in aside] == [2, 3, 7, 8, 9]
    assert "read 9 = kept 3 + rejected 5 (1 not UTF-8, 1 not JSON, 1 half of a" in caplog.text
    assert "1 `tools` is not JSON, 1 a str where an object was expected)" in caplog.text
    assert "+ duplicate 1" in caplog.text


def test_tools_and_pictures_tell_conversations_apart(tmp_path: Path) -> None:
    pictures = [{"image": name, "conversations": turns("What is this?")} for name in "aba"]
    tools = [{"tools": [{"name": name}], "conversations": turns("Look.")} for name in "cc"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [*pictures, *tools])))
    folder = prep(config(tmp_path, [Source(str(path))], split_eval=0.0))
    records = list(read_jsonl(folder / "train.jsonl"))
    assert [r.get("image") for r in records] == ["a", "b", None]
    assert records[2]["tools"] == [{"type": "function", "function": {"name": "c"}}]
    assert len({r["id"] for r in records}) == 3


def test_pictures_by_other_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"images": [name], "conversations": turns("What is this?")} for name in "aba"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    folder = prep(config(tmp_path, [Source(str(path))], split_eval=0.0))
    assert [r["image"] for r in read_jsonl(folder / "train.jsonl")] == [["a"], ["b"]]
    assert "2 conversations are about a picture" in caplog.text


def test_what_is_not_read_of_a_record_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    caplog.set_level(logging.INFO)
    record = {"id": 1, "messages": turns("a", "b"), "reward": 0.5, "source": "x", "thinking": "y"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"id": 2}))
    sources = [Source(str(tmp_path / "a.jsonl"))]
    row = {"instruction": "c", "response": "d", "category": "e"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "b.parquet")
    sources.append(Source(str(tmp_path / "b.parquet"), "instruction"))
    prep(config(tmp_path, [*sources, write(tmp_path / "c.jsonl", turns("e", "f"))]))
    told = [text for text in caplog.messages if "not read of its records" in text]
    assert [text.rpartition("/")[2] for text in told] == [
        "a.jsonl: not read of its records: reward, thinking",
        "b.parquet: not read of its records: category",
    ]


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        source = write(tmp_path / "a.jsonl", *(turns(f"{n} " * 500) for n in range(count)))
        cfg = config(tmp_path, [source], split_eval=0.5)
        cfg.prep.force = True
        tracemalloc.start()
        try:
            prep(cfg)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # loads what loads late
    assert (peak(4000) - peak(1000)) / 3000 < 400  # bytes per record of 2.5 kB


def test_nothing_rejected_leaves_no_file(tmp_path: Path) -> None:
    folder = prep(config(tmp_path, [Source("synthetic:train", limit=8)]))
    names = {path.name for path in folder.iterdir()}
    assert names == {"train.jsonl", "eval.jsonl", "account.json", "run.json"}


def test_a_system_message_joins_the_first_user_turn(tmp_path: Path) -> None:
    source = tmp_path / "chats.jsonl"
    roles = ("system", "user", "assistant")
    messages = [{"role": role, "content": role} for role in roles]
    source.write_text(json.dumps({"id": "a", "conversations": messages}) + "\n")
    folder = prep(config(tmp_path, [Source(path=str(source))], system="join", split_eval=0.0))
    (record,) = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    assert record["conversations"] == [{"role": "user", "content": "system\n\nuser"}, messages[2]]


def test_max_turns_counts_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(
        tmp_path / "a.jsonl",
        turns("a", "1", "b", "2", "c"),
        turns("a", "1"),
        turns("d", "1", "e"),
        turns("f"),
        [{"role": "assistant", "content": "0"}, *turns("g", "1")],
    )
    with caplog.at_level(logging.INFO):
        folder = prep(config(tmp_path, [source], max_turns=1, split_eval=0.0))
    kept = [r["conversations"] for r in read_jsonl(folder / "train.jsonl")]
    assert kept == [turns("a", "1"), turns("d", "1"), turns("f"), turns("g", "1")]
    assert "duplicate 1" in caplog.text  # the first two are the same after one answer
    assert "2 cut at max_turns" in caplog.text
    assert "1 without the answers before their first user message" in caplog.text


def test_ids_are_unique(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record = {"id": 0, "conversations": turns(name)}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    sources = [Source(str(tmp_path / f"{name}.jsonl")) for name in ("a", "b")]
    folder = prep(config(tmp_path, sources, split_eval=0.0))
    first, second = (r["id"] for r in read_jsonl(folder / "train.jsonl"))
    assert first == "0"
    assert second.startswith("0-")


def test_sample_size_takes_the_first(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *(turns(str(n)) for n in range(9)))
    folder = prep(config(tmp_path, [source], sample_size=3, split_eval=0.0))
    assert openings(folder, "train") == ["0", "1", "2"]
    assert openings(folder, "eval") == []


def test_the_split_is_disjoint_and_stable(tmp_path: Path) -> None:
    def split(count: int, share: float) -> tuple[set[str], set[str]]:
        data = [turns(str(n)) for n in range(count)]
        cfg = config(tmp_path, [write(tmp_path / "a.jsonl", *data)], split_eval=share)
        cfg.prep.force = True
        folder = prep(cfg)
        return set(openings(folder, "train")), set(openings(folder, "eval"))

    train, held_out = split(200, 0.2)
    assert not train & held_out
    assert len(train | held_out) == 200
    assert 20 <= len(held_out) <= 60
    more_train, more_held_out = split(400, 0.2)
    assert train < more_train
    assert held_out < more_held_out
    assert [len(part) for part in split(3, 0.001)] == [2, 1]
    assert [len(part) for part in split(3, 0.999)] == [1, 2]
    assert [len(part) for part in split(1, 0.5)] == [1, 0]


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    data = [turns("the same question", str(n)) for n in range(20)]
    cfg = config(tmp_path, [write(tmp_path / "a.jsonl", *data)], split_eval=0.3)
    folder = prep(cfg)
    assert openings(folder, "train")
    assert openings(folder, "eval") == []


@pytest.mark.parametrize("data", ["train", "eval"])
def test_an_empty_data_set_is_an_error(tmp_path: Path, data: str) -> None:
    good, bad = Source("synthetic:train", limit=2), write(tmp_path / "bad.jsonl", "{")
    sources = {"train": [good], "eval": [good], data: [bad]}
    with pytest.raises(InputError, match=rf"data.{data} is left without .* \(1 not JSON\)"):
        prep(config(tmp_path, sources["train"], eval=sources["eval"]))


def test_a_refusal_says_what_a_record_is_and_names_no_file_that_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match=r"bad\.jsonl:1: not JSON.* A record is \{.conversations"):
        prep(config(tmp_path, [write(tmp_path / "bad.jsonl", "{")]))
    assert "rejected.jsonl" not in caplog.text


def test_no_source_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train names no source"):
        prep(config(tmp_path, []))
    cfg = config(tmp_path, [Source(str(tmp_path / "none.jsonl"))])
    with pytest.raises(InputError, match=r"none.jsonl does not exist"):
        prep(cfg)
    assert not paths.prompts_dir(cfg).parent.exists()


def test_complete_is_reused_and_changes_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", turns("1"), turns("2"))
    cfg = config(tmp_path, [Source(str(tmp_path / "in"))])
    folder = prep(cfg)
    made = (folder / "run.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        assert prep(cfg) == folder
    assert "complete, reused" in caplog.text
    assert (folder / "run.json").stat().st_mtime_ns == made
    with pytest.raises(InputError, match=r"data\.max_turns was None, now 1"):
        prep(replace(cfg, data=replace(cfg.data, max_turns=1)))
    write(tmp_path / "in" / "b.jsonl", turns("3"))
    with pytest.raises(InputError, match=r"number of local files was 1, now 2; .*b.jsonl has"):
        prep(cfg)
    (tmp_path / "in" / "b.jsonl").unlink()
    write(tmp_path / "in" / "a.jsonl", turns("1"), turns("4"))
    with pytest.raises(InputError, match=r"a.jsonl has changed.*prep.force=true"):
        prep(cfg)
    assert "2" in {*openings(folder, "train"), *openings(folder, "eval")}
    cfg.prep.force = True
    prep(cfg)
    assert {*openings(folder, "train"), *openings(folder, "eval")} == {"1", "4"}


def test_what_stands_in_for_the_hub_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "n").mkdir(parents=True)
    cfg = config(tmp_path, [Source("hub:o/n/a.jsonl")], split_eval=0.0)
    write(tmp_path / "o" / "n" / "a.jsonl", turns("1"))
    prep(cfg)
    assert prep(cfg) == paths.prompts_dir(cfg)
    write(tmp_path / "o" / "n" / "a.jsonl", turns("2"))
    with pytest.raises(InputError, match=r"o/n/a.jsonl has changed.*prep.force=true"):
        prep(cfg)


def test_an_interrupted_run_leaves_nothing_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, [Source("synthetic:train", limit=8)])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "drop_known", killed)
        with pytest.raises(KeyboardInterrupt):
            prep(cfg)
    folder = paths.prompts_dir(cfg)
    assert not folder.exists()
    assert prep(cfg) == folder
    assert len(openings(folder, "train")) + len(openings(folder, "eval")) == 8
    assert [path.name for path in folder.parent.iterdir()] == ["d"]


def test_check_says_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", turns("1"), turns("2"))
    cfg = config(tmp_path, [source])
    monkeypatch.setattr("sys.argv", ["prep.py", "data=local", "data.path=a b", "prep.check=true"])
    cfg.prep.check = True
    with pytest.raises(InputError, match=r"it with: python prep\.py data=local 'data\.path=a b'"):
        prep(cfg)
    assert not (tmp_path / "datasets").exists()
    cfg.prep.check = False
    folder = prep(cfg)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    cfg.prep.check = True

    def said(now: Config = cfg) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert prep(now) == folder
        return caplog.text

    assert "1 training and 1 held-out conversations, 0.0 MB, made 20" in said()
    assert "its inputs have not changed" in said()
    assert "data.max_turns was None, now 1; again: python prep.py data=local" in said(
        replace(cfg, data=replace(cfg.data, max_turns=1))
    )
    later = (folder / "run.json").stat().st_mtime + 5
    os.utime(source.path, (later, later))
    assert "a.jsonl was written later; again: " in said()
    Path(source.path).unlink()
    assert "a.jsonl does not exist" in said()
    (folder / "account.json").unlink()
    with pytest.raises(InputError, match=r"account\.json is missing; make it again with"):
        said()
    del before[folder / "account.json"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_exit_code_of_check(tmp_path: Path) -> None:
    options = [f"paths.{name}={tmp_path}/{name}" for name in ("datasets", "checkpoints")]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [str(REPOSITORY / "prep.py"), "data=synthetic", *options, *more]
        return warm.run(command, cwd=tmp_path, kind="apps")

    missing = run("prep.check=true")
    assert missing.returncode == 1
    made = f"make it with: python {REPOSITORY}/prep.py data=synthetic {options[0]}"
    assert made in missing.stderr
    assert run().returncode == 0
    there = run("prep.check=true")
    assert there.returncode == 0
    assert "100 training and 10 held-out conversations" in there.stdout
