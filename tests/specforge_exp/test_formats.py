"""What each format makes of a raw record."""

from pathlib import Path
from typing import Any

import pytest
from test_sources import conversation, set_aside, texts, write_lines

from specforge_exp.config import Source
from specforge_exp.data.files import Rejected
from specforge_exp.data.formats import FORMATS, PARTS, convert
from specforge_exp.data.sources import load

TABLES: list[tuple[str, dict[str, Any]]] = [
    ("conversations", conversation("1", id="a", system="Be brief.", tools=[{"name": "f"}])),
    ("conversations", conversation("2", functions=[{"name": "f"}], image="x", url="y", source="z")),
    ("conversations", {"messages": conversation("3")["conversations"], "conversation_id": 7}),
    ("image", {"conversation": conversation("4 <image>")["conversations"], "prompt_id": "b"}),
    ("instruction", {"instruction": "5", "input": "x", "output": "y", "system": "z", "uuid": "c"}),
    ("instruction", {"instruction": "6", "response": "y", "tools": [{"name": "f"}]}),
    ("instruction", {"instruction": "7", "response": "y", "history": [["a", "b"]]}),
    ("instruction", {"instruction": "7", "context": "x", "response": "y", "system_prompt": "z"}),
    ("prompt", {"prompt": "8", "chosen": "x", "history": [["a", "b"]], "system": "z"}),
    ("prompt", {"input": [{"role": "user", "content": "9"}], "output": "x", "tools": "[]"}),
    ("mt-bench", {"turns": ["10", "11"]}),
    ("humaneval", {"prompt": "def f():", "task_id": "t/1"}),
    ("gsm8k", {"question": "8?", "id": "d"}),
    ("gsm8k", {"prompt": "9?"}),
    ("math", {"question": "10?"}),
    ("math", {"problem": "11?"}),
    ("livecodebench", {"question_content": "12?", "starter_code": "class A:"}),
    ("alpaca", {"instruction": "13", "input": "x"}),
]


@pytest.mark.parametrize(("name", "record"), TABLES)
def test_of_a_table_all_is_read_that_its_format_knows(name: str, record: dict[str, Any]) -> None:
    """What a line of JSON gives, though only some columns are read."""
    adapt, columns = FORMATS[name]
    read_of = columns.of("a.parquet", [*record, "other"])
    assert read_of == list(record)
    assert not isinstance(convert(("a", record), adapt), Rejected)


@pytest.mark.parametrize("name", ["conversations", "image", "instruction", "prompt"])
@pytest.mark.parametrize(
    "more",
    [{"label": False}, {"kto_tag": False}, {"chat_template_kwargs": {"enable_thinking": True}}],
)
def test_what_forbids_a_record_is_read_of_a_table_too(name: str, more: dict[str, Any]) -> None:
    adapt, columns = FORMATS[name]
    both = {"instruction": "x", "output": "y", "prompt": "x"}
    record = {**(both if name in ("instruction", "prompt") else conversation("1")), **more}
    kept = columns.of("a.parquet", [*record])
    found = convert(("a", {key: record[key] for key in kept}), adapt)
    assert isinstance(found, Rejected) and next(iter(more)) in found.reason


def test_gsm8k(tmp_path: Path) -> None:
    records = [{"question": "1+1?", "answer": "2"}, {"id": "b", "prompt": "2+2?"}, {"x": 1}]
    path = write_lines(tmp_path / "g.jsonl", *records)
    assert texts(Source(str(path), "gsm8k")) == ["1+1?", "2+2?"]
    assert set_aside(Source(str(path), "gsm8k"))[0].reason == "no `question` or `prompt` text"


def test_instructions(tmp_path: Path) -> None:
    records = [
        {"id": 7, "instruction": "Add.", "input": "1, 2", "output": "3", "tag": "x"},
        {"instruction": "Say hi.", "input": "", "response": "Hi."},
        {"instruction": "Say hi."},
        {"output": "Hi."},
        {"instruction": "And?", "output": "Bye.", "history": [["Hi", "Hello"], ["Go", "on"]]},
        {"instruction": "Double.", "input": 5, "output": "10"},
    ]
    path = write_lines(tmp_path / "a.jsonl", *records)
    first, second, third = load(Source(str(path), "instruction"), "test")
    assert first["id"] == "7"
    assert [m["content"] for m in first["conversations"]] == ["Add.\n\n1, 2", "3"]
    assert [m["content"] for m in second["conversations"]] == ["Say hi.", "Hi."]
    reasons = [item.reason for item in set_aside(Source(str(path), "instruction"))]
    assert [m["content"] for m in third["conversations"]] == "Hi Hello Go on And? Bye.".split()
    assert reasons[:2] == ["no `output` or `response` or `chosen` text", "no `instruction` text"]
    assert reasons[2:] == ["`input` is not text"]
    closed = {
        "instruction": "Who?",
        "input": "Guess.",
        "context": "Ada wrote it.",
        "response": "Ada.",
        "rejected": "B.",
    }
    write_lines(path, closed, {"instruction": "Who?", "chosen": "Ada.", "rejected": "Bo."})
    said = [
        [m["content"] for m in r["conversations"]]
        for r in load(Source(str(path), "instruction"), "t")
    ]
    assert said == [["Who?\n\nGuess.\n\nAda wrote it.", "Ada."], ["Who?", "Ada."]]
    write_lines(path, {"instruction": "Who?", "output": "Ada.", "history": [["a"]]})
    assert set_aside(Source(str(path), "instruction"))[0].reason == "`history` is no list of pairs"


ASKED, SAID = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "1+1?", "completion": "2"},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [{**SAID, "content": "3"}]},
        {"prompt": "1+1?", "chosen": [ASKED, SAID], "rejected": [ASKED, {**SAID, "content": "3"}]},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, {**SAID, "content": "3"}]},
        {"query": "1+1?", "response": "2", "history": []},
        {"input": [ASKED], "output": "2", "label": True},
        {"question": "1+1?", "response": "2", "input": ""},
    ],
)
def test_prompts_and_completions(tmp_path: Path, record: dict[str, Any]) -> None:
    told = {"role": "system", "content": "Be brief."}
    whole = {"prompt": "1+1?", "chosen": [told, ASKED, SAID]}
    longer = {"query": "1+1?", "response": "2", "history": [["Hi", "Hello"]]}
    path = write_lines(tmp_path / "a.jsonl", record, whole, longer)
    found, last, more = load(Source(str(path), "prompt"), "test")
    assert [m["content"] for m in more["conversations"]] == ["Hi", "Hello", "1+1?", "2"]
    assert found["conversations"] == [ASKED, SAID]
    assert last["conversations"] == [told, ASKED, SAID]
    assert not {"chosen", "prompt", "completion", "rejected"}.intersection(found)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": [ASKED]}, ""),
        ({"prompt": "1+1?", "input": "x"}, "several of one kind; `prompt`, `input`"),
        ({"prompt": "1+1?", "completion": "x", "chosen": "y"}, "several of one kind; `comp"),
        ({"prompt": 5}, "no `prompt` or `input` or `query` or `question`, text or messages"),
        ({"text": "x"}, "no `prompt` or"),
        ({"question": "Who?", "context": "Ada.", "response": "x"}, "`context` is not read"),
        ({"question": "Which?", "choices": ["a", "b"]}, "`choices` is not read"),
        ({"chosen": "\n\nHuman: 1+1?\n\nAssistant: 2", "rejected": "x"}, "no user message"),
        ({"prompt": "1+1?", "completion": "3", "label": False}, "`label` is false"),
        (["1+1?"], "a list where an object was expected"),
    ],
)
def test_prompts_alone_and_none(record: object, reason: str) -> None:
    found = convert(("a", record), FORMATS["prompt"].adapt)
    table = FORMATS["prompt"].columns.among(["prompt", *PARTS, "rejected"])
    assert table == ["prompt", *PARTS]
    if isinstance(found, Rejected):
        assert reason and found.reason.startswith(reason)
    else:
        assert not reason and found["conversations"] == [ASKED]


def test_pictures_leave_the_text(tmp_path: Path) -> None:
    def about(text: str) -> dict[str, Any]:
        pair = [{"from": "human", "value": text}, {"from": "gpt", "value": "A <b>cat</b>. "}]
        return {"image": "coco/1.jpg", "conversations": pair}

    asks = ["<image>\nWhat?", "Why?\n<image>", "<video><audio>Who?"]
    path = write_lines(tmp_path / "a.jsonl", *map(about, asks))
    records = load(Source(str(path), "image"), "test")
    assert [r["conversations"][0]["content"] for r in records] == ["What?", "Why?", "Who?"]
    assert records[0]["conversations"][1]["content"] == "A <b>cat</b>. "
    assert records[0]["image"] == "coco/1.jpg"
    write_lines(path, about("<image>"), [5], {"conversations": [5]}, 5)
    kinds = [item.reason for item in set_aside(Source(str(path), "image"))]
    assert kinds[0] == "no user message"
    assert len(kinds) == 4
