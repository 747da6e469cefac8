"""Answers of an OpenAI-compatible server: what its streams may be."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from test_chatting import asked, begun

from specforge_exp.chat.dialogue import Piece
from specforge_exp.chat.remote import RemoteModel
from specforge_exp.config import Config
from specforge_exp.errors import InputError


@dataclass
class Scripted:
    """What a server sends to whoever asks, byte for byte, and what it was asked."""

    url: str = ""
    events: bytes = b""
    body: Any = None
    models: Any = None


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    state = Scripted(models={"data": [{"id": "x"}]})

    async def models(_: web.Request) -> web.Response:
        return web.json_response(state.models)

    async def completions(http: web.Request) -> web.StreamResponse:
        state.body = await http.json() | {"key": http.headers.get("Authorization")}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        await response.write(state.events)
        return response

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", completions)
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        state.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()

    loop.create_task(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(60)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    yield state
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def remote(cfg: Config, url: str) -> RemoteModel:
    return RemoteModel(replace(cfg, chat=replace(cfg.chat, url=url)))


def lines(*events: str) -> bytes:
    return b"".join(b"data: " + event.encode() + b"\n\n" for event in events)


def test_a_stream_is_heard(cfg: Config, scripted: Scripted) -> None:
    scripted.events = lines(
        '{"choices": [{"delta": {"role": "assistant"}}]}',
        '{"choices": [{"delta": {"reasoning_content": "hm"}}]}',
        '{"choices": [{"delta": {"content": "a"}}]}',
        '{"choices": [{"delta": {"content": "b\\n"}, "finish_reason": "stop"}]}',
        '{"choices": [], "usage": {"completion_tokens": 17}}',
        "[DONE]",
    )
    model = remote(cfg, scripted.url)
    dialogue = begun(asked("hi"), temperature=0.5, top_p=0.9, system="Be kind.")
    *_, spoken = model.answer(dialogue)
    assert spoken.pieces == [Piece("hm", "thought"), Piece("a"), Piece("b\n")]
    assert (spoken.text, spoken.tokens, spoken.gained, spoken.end) == ("ab\n", 17, [], "")
    assert scripted.body == {
        "model": "x", "messages": dialogue.whole, "stream": True, "temperature": 0.5, "top_p": 0.9,
        "stream_options": {"include_usage": True}, "max_tokens": 60, "key": "Bearer k",
    }  # fmt: skip


def test_speed_is_that_of_tokens_after_the_first(
    cfg: Config, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what opens a stream before the prompt was read, nor of pieces, which may hold several
    tokens each where nothing says how many."""
    events = [
        '{"choices": [{"delta": {"role": "assistant", "content": ""}}]}',
        '{"choices": [{"delta": {"content": "a"}}]}',
        '{"choices": [{"delta": {"content": "b"}}]}',
        '{"choices": [{"delta": {}, "finish_reason": "stop"}]}',
        '{"choices": [], "usage": {"completion_tokens": 9}}',
    ]
    clock = count(0.0, 0.25)
    seconds = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("specforge_exp.chat.remote.time", seconds)
    for number, said in ((5, "11 tokens/s · 9 tokens"), (4, "2 pieces/s · 2 pieces")):
        scripted.events = lines(*events[:number])
        told = [s.status() for s in remote(cfg, scripted.url).answer(begun(asked("hi")))]
        assert told[:2] == ["0 pieces", "1 pieces"] and told[-1] == said


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        (lines('{"choices": [{"delta": {"content": "a"}}]}'), "broke the answer off"),
        (lines('{"error": {"message": "overloaded"}}'), "overloaded"),
        (lines('{"choices": [{"delta": "a"}]}'), "its stream is not OpenAI's"),
        (lines('{"choices": 3}'), "its stream is not OpenAI's"),
        (b"data: {\n\n", "no stream of JSON"),
        (b"<html>", "no stream of JSON"),
        (b"", "broke the answer off"),
    ],
)
def test_a_stream_that_is_none(cfg: Config, scripted: Scripted, events: bytes, reason: str) -> None:
    scripted.events = events
    with pytest.raises(InputError, match=reason):
        list(remote(cfg, scripted.url).answer(begun(asked("hi"))))


def test_which_model_of_a_server(cfg: Config, scripted: Scripted) -> None:
    scripted.models = {"data": [{"id": "x"}, {"id": "y"}]}
    dialogue = begun(asked("hi"))
    with pytest.raises(
        InputError, match=r"serves \['x', 'y'\]; choose one with engine.served_name"
    ):
        list(remote(cfg, scripted.url).answer(dialogue))
    with pytest.raises(InputError, match="is no list as OpenAI"):
        list(remote(cfg, scripted.url.removesuffix("/v1")).answer(dialogue))
    cfg.engine.served_name = "y"
    scripted.events = lines('{"choices": [{"delta": {}, "finish_reason": "length"}]}')
    *_, spoken = remote(cfg, scripted.url).answer(dialogue)
    assert scripted.body["model"] == "y" and spoken.end == "ended by the server: length"
