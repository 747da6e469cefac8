"""One conversation: which turns are answered, what is kept, and when it ends."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from instant_engine import Instant, rules, said

from specforge_exp.data.messages import Unrenderable
from specforge_exp.generation.engine import Answer, Failed, Refused, Request, Sampling
from specforge_exp.generation.regenerate import Item, Record, regenerate


def talk(*texts: str, **more: Any) -> Record:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"id": "c", "conversations": messages, **more}


def outcome(record: Record, engine: Instant, sample: int = 0, **changes: Any) -> Record:
    return asyncio.run(regenerate(Item(record, sample), rules(**changes), engine.answer))


def contents(record: Record) -> list[str]:
    return [message["content"] for message in record["conversations"]]


def test_every_answer_is_the_targets_own_and_is_built_upon() -> None:
    engine = Instant(reply=lambda request: said(f"answer {len(request.messages)}"))
    system = {"role": "system", "content": "Be brief."}
    record = talk("one", "old", "two", "old", "three", category="x")
    record["conversations"].insert(0, system)
    found = outcome(record, engine)
    assert contents(found) == [
        "Be brief.",
        "one",
        "answer 2",
        "two",
        "answer 4",
        "three",
        "answer 6",
    ]
    assert [len(request.messages) for request in engine.asked] == [2, 4, 6]
    assert engine.asked[1].messages[2]["content"] == "answer 2"
    assert found["finish_reasons"] == ["stop"] * 3 and found["generated_tokens"] == 12
    assert found["prompt_tokens"] == [10] * 3
    assert found["category"] == "x"
    assert found["regenerated"]["model"] == "m" and found["regenerated"]["time"]
    assert contents(record)[2] == "old"


def test_the_day_of_an_answer_is_the_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which its server's chat template told the target; preprocess tells the draft the same."""
    monkeypatch.setenv("TZ", "UTC-14")
    time.tzset()
    try:
        told = outcome(talk("?"), Instant(reply=lambda request: said("!")))["regenerated"]["time"]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert told.endswith("+14:00")


def test_marks_that_the_server_has_not_read() -> None:
    """A channel's words are no answer; thoughts between marks that are read here are."""
    raw = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>42"
    marks = ("<|channel|>", "<|message|>", "<think>", "</think>")
    engine = Instant(reply=lambda request: said(raw))
    found = outcome(talk("?"), engine, marks=marks)
    assert "the answer holds <|channel|>" in found["error"] and "reasoning_parser" in found["error"]
    assert engine.asked[0].special_tokens
    engine = Instant(reply=lambda request: said("<think>\nhm\n</think>\n\n42"))
    found = outcome(talk("?"), engine, marks=marks, thinking="kept")
    assert found["conversations"][-1]["reasoning_content"] == "hm"
    outcome(talk("?"), engine)
    assert not engine.asked[-1].special_tokens


def test_tools_and_their_results_stay() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {}}]}
    result = {"role": "tool", "content": "42", "tool_call_id": "1"}
    messages = [
        {"role": "user", "content": "?"},
        call,
        result,
        {"role": "assistant", "content": "o"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = {"id": "c", "conversations": messages, "tools": tools}
    engine = Instant(reply=lambda request: said("new"))
    found = outcome(record, engine)
    assert found["conversations"][:3] == messages[:3] and contents(found)[3] == "new"
    assert engine.asked[0].tools == tools
    told = {"id": "c", "conversations": messages[:3]}  # the result is what is to be answered
    assert contents(outcome(told, engine))[3:] == ["new"]
    only = {"id": "c", "conversations": messages[:2]}
    assert outcome(only, engine)["error"].startswith("nothing to answer")


def test_an_answer_with_the_weight_0_stays() -> None:
    record = talk("2 + 2?", "5.", "No.", "Sorry.")
    record["conversations"][1]["weight"] = 0
    found = outcome(record, engine := Instant(reply=lambda request: said("4.")))
    assert contents(found) == ["2 + 2?", "5.", "No.", "4."] and len(engine.asked) == 1
    assert found["conversations"][1]["weight"] == 0 and found["finish_reasons"] == ["stop"]


def test_an_answer_that_calls_a_tool_is_the_last() -> None:
    reply = said("", "tool_calls", tool_calls=[{"id": "1"}])
    found = outcome(talk("one", "old", "two", "old"), Instant(reply=lambda request: reply))
    assert len(found["conversations"]) == 2 and found["finish_reasons"] == ["tool_calls"]


def test_truncated_answers() -> None:
    def cut(request: Request) -> Answer:
        enough = request.sampling.max_tokens > 8
        return said("whole" if enough else "cut", "stop" if enough else "length")

    record, sampling = talk("one"), Sampling(max_tokens=8)
    keep = outcome(record, Instant(reply=cut), sampling=sampling)
    assert contents(keep) == ["one", "cut"] and keep["finish_reasons"] == ["length"]
    longer = Instant(reply=cut)
    again = outcome(record, longer, sampling=sampling, truncated="retry")
    assert contents(again) == ["one", "whole"]
    assert [request.sampling.max_tokens for request in longer.asked] == [8, 16]
    assert len({request.seed for request in longer.asked}) == 1  # the same answer, with more room
    twice = outcome(record, Instant(reply=cut), sampling=Sampling(max_tokens=4), truncated="retry")
    assert contents(twice) == ["one", "cut"] and twice["finish_reasons"] == ["length"]
    drop = outcome(record, Instant(reply=cut), sampling=sampling, truncated="drop")
    assert drop["error"] == "cut at regen.max_tokens=8" and contents(drop) == ["one"]

    def second_cut(request: Request) -> Answer:
        return said("x", "length" if len(request.messages) > 1 else "stop")

    part = outcome(talk("1", "o", "2", "o"), Instant(reply=second_cut), truncated="drop")
    assert contents(part) == ["1", "x"] and "error" not in part


def test_a_cut_within_a_character_leaves_no_mark() -> None:
    """Its mark would be taught; one that the model has written out stays."""
    for reason, text in {"length": "caf", "stop": "caf\N{REPLACEMENT CHARACTER}"}.items():
        reply = said("caf\N{REPLACEMENT CHARACTER}", reason)
        assert contents(outcome(talk("one"), Instant(reply=lambda _, r=reply: r)))[1] == text


@pytest.mark.parametrize("thinking", ["model", "on", "kept", "off"])
@pytest.mark.parametrize("inline", [True, False])
def test_thoughts(thinking: str, inline: bool) -> None:
    reply = said("<think>\nhm\n</think>\n\nyes") if inline else said("yes", reasoning_content="hm")
    found = outcome(talk("one"), Instant(reply=lambda request: reply), thinking=thinking)
    message = found["conversations"][1]
    if thinking == "model":
        assert message == reply.message
        return
    assert message["content"] == "yes"
    assert message.get("reasoning_content") == ("hm" if thinking == "kept" else None)


def test_thoughts_that_are_none() -> None:
    """Neither an empty one nor the lines after one are part of what is kept."""
    replies = said("<think>\n\n</think>\n\nyes"), said("\n\nyes", reasoning_content="\n")
    for reply in replies:
        found = outcome(talk("one"), Instant(reply=lambda _, r=reply: r), thinking="kept")
        assert found["conversations"][1] == {"role": "assistant", "content": "yes"}


def test_nothing_but_thoughts_is_a_failure() -> None:
    def thinks(request: Request) -> Answer:
        return said("yes") if len(request.messages) < least else said("<think>\nhm", "length")

    least = 1
    found = outcome(talk("one"), Instant(reply=thinks), thinking="on")
    assert "nothing but thoughts in regen.max_tokens=4096" in found["error"]
    least = 3  # what came before counts
    found = outcome(talk("one", "o", "two"), Instant(reply=thinks), thinking="on")
    assert contents(found) == ["one", "yes"] and "error" not in found


def test_an_empty_answer_is_asked_again_with_another_seed() -> None:
    engine = Instant(reply=lambda request: said("" if len(engine.asked) < 3 else "x"))
    assert contents(outcome(talk("one"), engine, attempts=3)) == ["one", "x"]
    assert len({request.seed for request in engine.asked}) == 3
    found = outcome(talk("one"), Instant(reply=lambda request: said(" \n")), attempts=2)
    assert found["error"] == "the answer is empty" and contents(found) == ["one"]
    later = Instant(reply=lambda request: said("" if len(request.messages) > 1 else "x"))
    assert outcome(talk("one", "o", "two"), later)["error"] == "the answer is empty"


def test_a_conversation_ends_where_max_length_is_full() -> None:
    def count(record: Record, messages: list[Any]) -> int:
        return 10 * len(messages)

    engine = Instant()
    found = outcome(talk("x" * 30, "o", "y" * 30, "o"), engine, max_length=15, count=count)
    assert len(found["conversations"]) == 2 and len(engine.asked) == 1
    found = outcome(talk("x"), engine, max_length=9, count=count)
    assert found["error"] == "the prompt alone has 10 tokens, max_length=9"

    assert "has 10 tokens" in outcome(talk("x"), engine, max_length=10, count=count)["error"]
    assert "error" not in outcome(talk("x"), engine, max_length=11, count=count)
    many = talk("\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 40)  # 120 bytes, each of which may be a token
    assert "error" in outcome(many, engine, max_length=150, count=lambda *_: 150)

    def never(record: Record, messages: list[Any]) -> int:
        raise AssertionError("a short conversation is not tokenised")

    outcome(talk("short"), engine, max_length=2048, count=never)
    for most, answers in ((104, 1), (105, 2), (208, 2), (209, 3)):  # what servers have counted
        engine = Instant(reply=lambda request: replace(said("x"), prompt_tokens=growing(request)))
        found = outcome(talk("1", "o", "2", "o", "3"), engine, max_length=most)
        assert len(engine.asked) == len(found["finish_reasons"]) == answers
    told = {**talk("short"), "tools": [{"function": {"name": "f"}}]}
    thought = talk("short", "o", "go on")
    thought["conversations"][1] |= {"weight": 0, "reasoning": "hm"}
    called = talk("short", "", "go on")
    called["conversations"][1]["tool_calls"] = [{"function": {"name": "f"}}]
    for record in (told, thought, called):  # how long those are, only the template knows
        found = outcome(record, engine, max_length=2048, count=lambda record, messages: 2048)
        assert found["error"] == "the prompt alone has 2048 tokens, max_length=2048"


def growing(request: Request) -> int:
    """100 tokens of a prompt, 4 of an answer, 100 more of the next question."""
    return 50 * (len(request.messages) + 1) + 2 * (len(request.messages) - 1)


@pytest.mark.parametrize("error", [Refused, Unrenderable, Failed])
def test_an_engine_that_gives_up(error: type[Exception]) -> None:
    """Refused later on, what came before counts; a failure is a failure."""

    def second(request: Request) -> Answer:
        if len(request.messages) > 1:
            raise error("too long")
        return said("x")

    found = outcome(talk("1", "o", "2", "o"), Instant(reply=second))
    if error is not Failed:
        assert contents(found) == ["1", "x"]
    else:
        assert found["error"] == "too long" and contents(found) == ["1", "o", "2", "o"]
        assert next(iter(found)) == "error"
    given = talk("1", "o", "2", "o", "3", "o")
    given["conversations"][3]["weight"] = 0  # stands between the last own answer and the end
    if error is not Failed:
        assert contents(outcome(given, Instant(reply=second))) == ["1", "x"]


def test_seeds_depend_on_the_request_alone() -> None:
    def seeds(name: str = "c", **changes: Any) -> list[int]:
        engine = Instant()
        outcome({**talk("1", "o", "2", "o"), "id": name}, engine, **changes)
        return [request.seed for request in engine.asked]

    assert seeds() == seeds() and len(set(seeds())) == 2
    assert not set(seeds()) & set(seeds(seed=1)) | set(seeds()) & set(seeds(sample=1))
    assert not set(seeds()) & set(seeds("d"))
    assert all(0 <= seed < 2**31 for seed in seeds())


def test_a_request_says_where_its_beginning_is() -> None:
    """The turns of one answer are one session, on one server, with one template."""
    engine = Instant()
    for sample in (0, 1):
        item = Item(talk("1", "o", "2", "o"), sample, server=3)
        asyncio.run(regenerate(item, rules(template_kwargs={"a": 1}), engine.answer))
    assert [request.session for request in engine.asked] == ["c/0"] * 2 + ["c/1"] * 2
    assert all((r.server, r.template_kwargs) == (3, {"a": 1}) for r in engine.asked)
