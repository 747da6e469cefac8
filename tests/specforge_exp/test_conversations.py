"""What data sets call a conversation, and what the project makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specforge_exp.data.conversations import (
    BadRecord,
    content_id,
    encode,
    normalise,
    read_jsonl,
)
from specforge_exp.errors import InputError

ASKED = {"role": "user", "content": "Weather in Rome?"}
SAID = {"role": "assistant", "content": "Sunny."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"name": "weather", "arguments": {"city": "Rome"}}


def test_openai_tool_use_is_kept() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [
        {"role": "developer", "content": "Be brief."},
        ASKED,
        {**answer, "reasoning_content": "I should look."},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Sunny."},
    ]
    record = normalise({"messages": messages, "tools": [TOOL]})
    found = record["conversations"]
    assert [m["role"] for m in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[2]["tool_calls"] == [call]
    assert found[2]["content"] == ""
    assert found[2]["reasoning_content"] == "I should look."
    assert found[3]["tool_call_id"] == "c1"
    assert record["tools"] == [TOOL]


def test_sharegpt_tool_use_becomes_openai_s() -> None:
    pairs = [
        ("human", "Weather in Rome?"),
        ("function_call", json.dumps(CALL)),
        ("observation", "sunny"),
        ("gpt", "Sunny."),
        ("tool_call", "no JSON"),
    ]
    turns = [{"from": role, "value": text} for role, text in pairs]
    raw = {"conversations": turns, "tools": json.dumps([TOOL]), "system": "Be brief."}
    record = normalise(raw)
    found = record["conversations"]
    roles = "system user assistant tool assistant assistant".split()
    assert [m["role"] for m in found] == roles
    assert found[0]["content"] == "Be brief."
    assert found[2] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    }
    assert found[5]["content"] == "no JSON"
    assert record["tools"] == [TOOL]
    assert "system" not in record


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("function", "tool"),
        ("tool_response", "tool"),
        ("function_response", "tool"),
        ("ipython", "tool"),
        ("model", "assistant"),
        ("bing", "assistant"),
    ],
)
def test_roles(role: str, meant: str) -> None:
    message = {"role": role, "content": "x", "name": "f"}
    assert normalise({"messages": [message]})["conversations"] == [{**message, "role": meant}]


@pytest.mark.parametrize("tools", ["", "[]", [], None, " "])
def test_no_tools_leave_no_key(tools: object) -> None:
    assert "tools" not in normalise({"messages": [ASKED], "tools": tools})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [ASKED], "tools": "{broken"}, "`tools` is not JSON"),
        ({"messages": [ASKED], "tools": "5"}, "`tools` is not a list"),
        ({"messages": [ASKED], "tools": ["{broken"]}, "`tools` is not JSON"),
        ({"messages": [ASKED], "tools": [5]}, "`tools` is no object"),
        ({"instruction": "x", "output": "y"}, "or `messages`; it has instruction, output"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [1]}]}, "content of a user message"),
        ({"messages": []}, "no `conversations`"),
        ({"messages": [{**ASKED, "weight": 0.5}]}, "`weight` of a message is neither .*: 0.5"),
        ({"messages": [{**ASKED, "loss": "no"}]}, "`loss` of a message is neither 0 nor 1"),
        ({"messages": [{**ASKED, "loss_scale": 2.0}]}, "`loss_scale` of a message is neither"),
        *(
            (
                {"messages": [ASKED, {"role": "assistant", "content": "b", name: [{"text": "c"}]}]},
                name,
            )
            for name in ("reasoning", "reasoning_content", "reasoning_details", "thinking_blocks")
        ),
        ({"messages": [{**ASKED, "train_detail": [{"train": False}]}]}, "`train_detail`"),
        ({"messages": [ASKED, SAID], "label": False}, "`label` is false"),
        ({"messages": [ASKED, SAID], "kto_tag": False}, "`kto_tag` is false"),
        ({"messages": [ASKED], "chosen": 5}, "its answer is no text and no message"),
        ({"messages": [ASKED], "chosen": {"value": "x"}}, "unknown role"),
        ({"messages": [ASKED], "system": [{"type": "text", "text": "x"}]}, "`system` .* not text"),
        ({"messages": [ASKED], "chat_template_kwargs": {"a": 1}}, "model.chat_template_kwargs"),
    ],
)
def test_bad_records(record: object, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        normalise(record)


def test_openai_s_older_calls_become_tool_calls() -> None:
    call = {"name": "weather", "arguments": "{}"}
    answer = {"role": "assistant", "content": None, "function_call": call}
    result = {"role": "function", "name": "weather", "content": "sunny"}
    plain = {"role": "assistant", "content": "Sunny.", "function_call": None}
    messages = [ASKED, answer, result, plain]
    record = normalise({"messages": messages, "functions": [TOOL["function"]]})
    _, called, told, said = record["conversations"]
    assert called["tool_calls"] == [{"type": "function", "function": call}]
    assert told["role"] == "tool" and record["tools"] == [TOOL]
    assert "function_call" not in called | said and "functions" not in record


@pytest.mark.parametrize(
    ("given", "kept"),
    [({"weight": 0}, {"weight": 0}), ({"weight": 0.0}, {"weight": 0}), ({"weight": 1}, {}),
     ({"weight": None}, {}), ({"loss": False}, {"weight": 0}), ({"loss": True, "weight": 1.0}, {}),
     ({"train": False}, {"weight": 0}), ({"loss_weight": 0.0}, {"weight": 0}),
     ({"train": True, "train_detail": None, "loss_scale": 1.0}, {})],
)  # fmt: skip
def test_weights(given: dict[str, Any], kept: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": "x"}
    assert normalise({"messages": [answer | given]})["conversations"] == [answer | kept]


@pytest.mark.parametrize(
    "tool",
    [
        TOOL["function"],
        {"type": "function", **TOOL["function"]},
        json.dumps(TOOL),
        json.dumps(TOOL["function"]),
        {**TOOL, "function": {**TOOL["function"], "parameters": '{"type": "object"}'}},
    ],
)
def test_tools_are_shown_as_servers_show_them(tool: Any) -> None:
    for tools in ([tool], json.dumps([tool])):
        record = normalise({"messages": [ASKED], "tools": tools})
        assert record["tools"] == [TOOL]
        assert normalise(record) == record
    for other in ({"type": "web_search", "name": "search"}, {**TOOL, "name": "weather"}):
        assert normalise({"messages": [ASKED], "tools": other})["tools"] == [other]


def test_calls_in_a_row_are_one_answer() -> None:
    """Where a call is a message of its own it belongs to the answer before it."""
    calls = [{"from": "tool_call", "value": json.dumps(CALL | {"name": n})} for n in "abc"]
    thoughts = {
        "from": "function_call",
        "value": f"<think>\nI look.\n</think>\n\n{json.dumps(CALL)}",
    }
    results = [{"from": "observation", "value": "sunny"}] * 2
    looking, last = {"from": "gpt", "value": "I look."}, {**calls[2], "loss": False}
    talk = [ASKED, *calls[:2], *results, looking, last, *results, thoughts, thoughts]
    found = normalise({"conversations": talk})["conversations"]
    roles = "user assistant tool tool assistant tool tool assistant assistant".split()
    assert [m["role"] for m in found] == roles
    names = [[call["function"]["name"] for call in m.get("tool_calls", [])] for m in found]
    assert names[1] == ["a", "b"] and names[4] == ["c"] and names[7:] == [["weather"]] * 2
    assert [found[n]["content"] for n in (1, 4)] == ["", "I look."]
    assert found[7]["content"] == "<think>\nI look.\n</think>" and found[4]["weight"] == 0
    assert normalise({"conversations": found})["conversations"] == found


@pytest.mark.parametrize("chosen", [SAID, [SAID], "Sunny.", [ASKED, SAID]])
def test_the_better_answer_of_a_pair_is_the_answer(chosen: object) -> None:
    pair = {"id": "a", "chosen": chosen, "rejected": {"role": "assistant", "content": "Rain."}}
    record = normalise(pair | {"messages": [ASKED]})
    assert record["conversations"] == [ASKED, SAID] and "chosen" not in record
    answered = normalise(pair | {"messages": [ASKED, {**SAID, "content": "Sun."}]})
    assert answered["conversations"][1:] == [{**SAID, "content": "Sun."}]
    assert normalise({"messages": [ASKED], "label": False})["conversations"] == [ASKED]
    for label in (0, True, None):  # 0 is a class, not a verdict
        assert normalise({"messages": [ASKED, SAID], "label": label})["conversations"][1:] == [SAID]


def test_a_single_part_of_text_is_the_text() -> None:
    said = normalise({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]})
    assert said["conversations"] == [{"role": "user", "content": "Hi"}]
    more = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    unlearnt = [{"type": "text", "text": "Hi", "train": False}]
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    for parts in (more, picture, [{"type": "text"}], [], unlearnt):
        with pytest.raises(BadRecord, match="user message is not text"):
            normalise({"messages": [{"role": "user", "content": parts}]})


def test_an_empty_list_hides_no_other() -> None:
    record = normalise({"id": "a", "conversations": [], "messages": [ASKED]})
    assert record == {"id": "a", "conversations": [ASKED]}


def test_the_system_text_of_the_messages_wins() -> None:
    system = {"role": "system", "content": "first"}
    record = normalise({"messages": [ASKED], "system": "first", "system_prompt": "second"})
    assert [m["content"] for m in record["conversations"]] == ["first", ASKED["content"]]
    record = normalise({"messages": [system, ASKED], "system": "second"})
    assert [m["content"] for m in record["conversations"]] == ["first", ASKED["content"]]
    record = normalise({"messages": [ASKED], "system_prompt": "third"})
    assert [m["content"] for m in record["conversations"]] == ["third", ASKED["content"]]
    assert "system_prompt" not in record


def test_ids() -> None:
    assert normalise({"uuid": "u", "messages": [ASKED]}) == {"id": "u", "conversations": [ASKED]}
    assert normalise({"id": None, "prompt_id": 5, "messages": [ASKED]})["id"] == "5"
    assert normalise({"id": 0, "uuid": "u", "messages": [ASKED]})["id"] == "0"
    first, second = (normalise({"messages": [ASKED]})["id"] for _ in range(2))
    assert first == second == content_id([ASKED])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_what_is_written_is_what_is_read(value: Any) -> None:
    line = encode(value)
    assert b"\n" not in line
    assert json.loads(line) == value


@given(st.dictionaries(st.text(), st.integers()))
def test_sorted_keys_make_equal_bytes(value: dict[str, int]) -> None:
    assert encode(dict(reversed(value.items())), sort=True) == encode(value, sort=True)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        encode({"content": "\ud83d"})


def test_lines(tmp_path: Path) -> None:
    records = [{"id": str(n), "conversations": [ASKED]} for n in range(2)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(encode(record) + b"\n" for record in records))
    assert list(read_jsonl(path)) == records
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:3: "):
        list(read_jsonl(path))
