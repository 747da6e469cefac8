"""Real servers on loopback that misbehave: each way ends as it should, and as fast."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from chat_shapes import SHAPES, Shape
from chat_templates import TALKS, tokenizer_of

from specforge_exp.config import Config
from specforge_exp.data.messages import Unrenderable
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import (
    Answer,
    Failed,
    Refused,
    Request,
    Sampling,
    ServerDied,
    Unreachable,
)
from specforge_exp.generation.openai_engine import OpenAIEngine, sent

Handler = Callable[[web.Request], Awaitable[web.Response]]
GOOD = {
    "choices": [{"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}
    },
}  # fmt: skip


def ask(
    cfg: Config,
    answers: list[Any],
    request: Request | None = None,
    gone: Callable[[int], bool] = lambda server: False,
) -> tuple[Answer, list[dict[str, Any]]]:
    """Ask a server that answers with these in turn, the last one for ever: its answer and what it
    was asked."""
    seen: list[dict[str, Any]] = []

    async def chat(asked: web.Request) -> web.Response:
        seen.append({"headers": dict(asked.headers), "body": await asked.json()})
        given = answers[min(len(seen), len(answers)) - 1]
        if given == "hang up":
            assert asked.transport is not None
            asked.transport.close()
            return web.Response()
        if given == "sleep":
            await asyncio.sleep(30)
        if isinstance(given, bytes):
            return web.Response(body=given)
        if isinstance(given, tuple):
            status, headers = given
            return web.json_response(
                {"error": {"message": "because"}}, status=status, headers=headers
            )
        return web.json_response(given)

    async def models(asked: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny_target"}]})

    async def whole() -> Answer:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        engine = OpenAIEngine(cfg, [f"http://127.0.0.1:{port}/v1/"], gone)
        try:
            return await engine.answer(request or simple())
        finally:
            await engine.close()
            await runner.cleanup()

    return asyncio.run(whole()), seen


def simple(**more: Any) -> Request:
    return Request([{"role": "user", "content": "hi", "weight": 1}], Sampling(), **more)


@pytest.fixture(autouse=True)
def impatient(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg.engine.retries = 2
    cfg.engine.timeout = cfg.engine.patience = 60.0  # beyond what this process may stand still
    monkeypatch.setattr("specforge_exp.generation.openai_engine.pause", lambda attempt: 0.02)


def test_what_is_asked_and_what_comes_back(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    request = simple(
        seed=5,
        tools=[{"type": "function"}],
        template_kwargs={"enable_thinking": False},
        session="s",
    )
    answer, [seen] = ask(cfg, [GOOD], request)
    assert answer == Answer({"role": "assistant", "content": "hello"}, "stop", 7, 3, 5)
    assert seen["headers"]["Modal-Session-ID"] == "s"
    assert seen["headers"]["Authorization"] == "Bearer key"
    assert seen["body"] == {
        "model": "tiny_target", "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4096, "temperature": 0.0, "top_p": 1.0, "seed": 5,
        "tools": [{"type": "function"}], "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


def test_a_server_is_told_what_its_generation_config_would_do(cfg: Config) -> None:
    """What is off for us and on for the model is sent, in the words that servers have for off."""
    sampling = Sampling(off=("top_k", "repetition_penalty"))
    _, [seen] = ask(cfg, [GOOD], replace(simple(), sampling=sampling))
    assert seen["body"]["top_k"] == -1 and seen["body"]["repetition_penalty"] == 1.0
    assert "min_p" not in seen["body"] and "off" not in seen["body"]
    assert "skip_special_tokens" not in seen["body"]
    kwargs = {"reasoning_effort": "low"}
    _, [seen] = ask(cfg, [GOOD], simple(template_kwargs=kwargs))
    assert (seen["body"]["reasoning_effort"], seen["body"]["chat_template_kwargs"]) == (
        "low",
        kwargs,
    )
    _, [seen] = ask(cfg, [GOOD], simple(special_tokens=True))
    assert seen["body"]["skip_special_tokens"] is False
    _, [seen] = ask(cfg, [GOOD], replace(simple(), sampling=Sampling(repetition_penalty=1.1)))
    assert seen["body"]["repetition_penalty"] == 1.1 and "top_k" not in seen["body"]


@pytest.mark.parametrize("as_text", [True, False])
def test_calls_are_sent_as_the_interface_has_them(cfg: Config, as_text: bool) -> None:
    """Data sets and templates have arguments as objects, servers take text."""
    arguments = {"city": "Köln", "days": [1, 2]}
    bare = {"name": "f", "arguments": json.dumps(arguments) if as_text else arguments}
    calls = [{"id": "1", "function": bare}, bare, {"function": {"name": "g"}}]
    message = {"role": "assistant", "content": "", "tool_calls": calls, "reasoning": "hm"}
    told = {"role": "tool", "content": "sun", "tool_call_id": "1", "name": "f"}
    _, [seen] = ask(cfg, [GOOD], Request([message, told], Sampling()))
    sent, after = seen["body"]["messages"]
    assert after == told and sent["reasoning_content"] == "hm"
    assert [call["type"] for call in sent["tool_calls"]] == ["function"] * 3
    assert [call["id"] for call in sent["tool_calls"]] == ["1", "", ""]  # vLLM refuses none
    functions = [call["function"] for call in sent["tool_calls"]]
    assert [json.loads(each["arguments"]) for each in functions] == [arguments, arguments, {}]
    assert [each["name"] for each in functions] == ["f", "f", "g"]
    nameless = {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}
    with pytest.raises(Unrenderable, match="a tool call has no name"):
        ask(cfg, [GOOD], Request([nameless], Sampling()))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.tools and s.name != "Granite 3"])
def test_an_empty_id_is_none_to_a_template(shape: Shape) -> None:
    """vLLM refuses a call without one; the prompt is the one that preprocess makes. Granite's has
    calls as JSON, with all keys that they have."""
    messages, tokenizer = TALKS["tool calls"], tokenizer_of(shape)
    there = [sent(message) for message in messages]
    for message in there:  # as servers hand it to their templates
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    assert [m.get("tool_call_id") for m in there] == [None, None, "", None]
    with_ids = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.id }}{% endfor %}{% endfor %}"
    )
    for template in (shape.template, shape.template + with_ids):
        mine, served = (
            tokenizer.apply_chat_template(m, chat_template=template, tokenize=False, **shape.kwargs)
            for m in (messages, there)
        )
        assert mine == served


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_thoughts_and_tool_calls_come_back(cfg: Config, key: str) -> None:
    """SGLang and vLLM call the thoughts differently; the answer has one name for them."""
    calls = [{"id": "1"}]
    given = {"content": None, key: "hm", "tool_calls": calls}
    answer, _ = ask(cfg, [{"choices": [{"message": given, "finish_reason": "tool_calls"}]}])
    assert answer.message == {
        "role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": calls
    }  # fmt: skip
    assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "bad",
    [(500, {}), b"{not json", b"[]", {"choices": []}, {"choices": [{"message": {"content": 3}}]},
     {"choices": None}, "sleep",
     *({"choices": [{"message": {"content": "hel"}, "finish_reason": reason}]}
       for reason in ("abort", "repetition"))],
    ids=str,
)  # fmt: skip
def test_another_attempt_helps(cfg: Config, bad: Any) -> None:
    if bad == "sleep":
        cfg.engine.timeout = 1.0
    answer, seen = ask(cfg, [bad, GOOD])
    assert answer.message["content"] == "hello"
    assert len(seen) == 2 or bad == "sleep"  # whose GOOD may be late as well


@pytest.mark.parametrize(
    ("bad", "why"),
    [((500, {}), "HTTP 500: because"), (b"{", "malformed"), ("sleep", r"engine\.timeout=1")],
)
def test_attempts_end(cfg: Config, bad: Any, why: str) -> None:
    if bad == "sleep":
        cfg.engine.timeout = 1.0
    with pytest.raises(Failed, match=why):
        ask(cfg, [bad])


@pytest.mark.parametrize("status", [429, 503])
def test_a_storm_is_waited_out(cfg: Config, status: int) -> None:
    """More refusals than attempts, since a busy server says nothing about the request."""
    answer, seen = ask(cfg, [(status, {})] * 20 + [GOOD])
    assert answer.message["content"] == "hello" and len(seen) == 21


def test_retry_after_is_obeyed(cfg: Config) -> None:
    began = time.monotonic()
    ask(cfg, [(429, {"Retry-After": "1"}), GOOD])
    assert time.monotonic() - began >= 1.0


def test_a_storm_without_end_stops_the_run(cfg: Config) -> None:
    cfg.engine.patience = 1.0
    with pytest.raises(Unreachable, match=r"too busy \(HTTP 429: because\).*what is done is kept"):
        ask(cfg, [(429, {})])


def test_a_connection_that_breaks_is_tried_again(cfg: Config) -> None:
    answer, seen = ask(cfg, ["hang up", "hang up", "hang up", "hang up", GOOD])
    assert answer.message["content"] == "hello" and len(seen) == 5


def test_a_server_of_our_own_that_ended(cfg: Config) -> None:
    with pytest.raises(ServerDied):
        ask(cfg, ["hang up"], gone=lambda server: True)


def test_a_request_that_is_refused_is_not_repeated(cfg: Config) -> None:
    with pytest.raises(Refused, match="HTTP 400: because"):
        ask(cfg, [(400, {}), GOOD])


def test_a_wrong_key_is_the_users(cfg: Config) -> None:
    with pytest.raises(InputError, match=r"HTTP 401: because; check .*OPENAI_API_KEY"):
        ask(cfg, [(401, {})])


@pytest.mark.timing
def test_nobody_there_is_said_soon(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specforge_exp.generation.openai_engine.FIRST_CONTACT", 0.3)
    cfg.engine.patience = 600.0
    engine = OpenAIEngine(cfg, ["http://127.0.0.1:9/v1"])

    async def many() -> list[Any]:
        asked = (engine.answer(simple()) for _ in range(40))
        try:
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await engine.close()

    began = time.monotonic()
    found = asyncio.run(many())
    assert time.monotonic() - began < 40 * 0.3
    for error in found:
        with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:9/v1: it cannot be reached"):
            raise error


def test_several_models_need_a_choice(cfg: Config) -> None:
    async def whole(names: list[str]) -> str:
        async def models(asked: web.Request) -> web.Response:
            return web.Response(text=json.dumps({"data": [{"id": name} for name in names]}))

        app = web.Application()
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        engine = OpenAIEngine(cfg, [f"http://127.0.0.1:{runner.addresses[0][1]}/v1"])
        try:
            return await engine.name_of(0)
        finally:
            await engine.close()
            await runner.cleanup()

    with pytest.raises(InputError, match=r"serves \['a', 'b'\].*engine\.served_name"):
        asyncio.run(whole(["a", "b"]))
    cfg.engine.name, cfg.engine.urls = "openai", ["http://a/v1"]
    assert asyncio.run(whole(["there/Tiny_Target"])) == "there/Tiny_Target"
    another = r"serves b, not model\.path=.*tiny_target; .*engine\.served_name=b"
    with pytest.raises(InputError, match=another):  # its answers would be taken for the target's
        asyncio.run(whole(["b"]))
    cfg.engine.served_name = "b"
    assert asyncio.run(whole(["a", "b"])) == "b"
