"""Servers elsewhere are asked through the environment's proxy, those of this machine never."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from test_openai_engine import GOOD, simple

from specforge_exp.bench.clients import counters, pieces, served_model
from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.generation.openai_engine import OpenAIEngine
from specforge_exp.serving.server import connections, proxy_of

FAR = "http://far.invalid:8000"
"""A server that only the proxy knows."""


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)


async def copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    """All that comes."""
    while part := await source.read(2**16):
        to.write(part)
        await to.drain()
    to.close()


@asynccontextmanager
async def proxied(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[list[str], str]]:
    """A model's server, and a proxy before it that the environment names: the heads of the requests
    that the proxy gets, and the server's own address."""

    async def chat(asked: web.Request) -> web.Response:
        if (await asked.json()).get("stream"):
            return web.Response(body=b'data: {"choices": []}\n\ndata: [DONE]\n\n')
        return web.json_response(GOOD)

    async def models(asked: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny_target"}]})

    async def metrics(asked: web.Request) -> web.Response:
        return web.Response(text='vllm:spec_decode_num_drafts_total{engine="0"} 3.0\n')

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port, heads = runner.addresses[0][1], list[str]()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        heads.append(head)
        if head.startswith("CONNECT"):
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        above, behind = await asyncio.open_connection("127.0.0.1", port)
        once = head.replace(FAR, "", 1).replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
        behind.write(once.encode())
        await asyncio.gather(copy(reader, behind), copy(above, writer))

    proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
    there = f"me:secret@127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    monkeypatch.setenv("HTTP_PROXY", f"http://{there}")
    monkeypatch.setenv("HTTPS_PROXY", there)  # as curl takes it
    try:
        yield heads, f"http://127.0.0.1:{port}"
    finally:
        proxy.close()
        await runner.cleanup()


def test_servers_elsewhere(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """By regeneration, bench and chat; with the proxy's own name and password."""

    async def whole() -> None:
        async with proxied(monkeypatch) as (heads, here):
            for root in (FAR, here, here.replace("127.0.0.1", "localhost")):
                heads.clear()
                engine = OpenAIEngine(cfg, [f"{root}/v1"])
                answer = await engine.answer(simple())
                await engine.close()
                assert answer.message["content"] == "hello"
                async with connections(10, "key") as http:
                    assert await served_model(http, f"{root}/v1", None) == "tiny_target"
                    events = pieces(http, f"{root}/v1/chat/completions", {"stream": True})
                    assert [event async for event in events] == [{"choices": []}]
                    assert await counters(http, root) == {"drafts": 3.0}
                asked = [head.split()[:2] for head in heads]
                assert all("Proxy-Authorization: Basic bWU6c2VjcmV0" in head for head in heads)
                paths = ["models", "chat/completions"] * 2
                urls = [*(f"{FAR}/v1/{path}" for path in paths), f"{FAR}/metrics"]
                assert [url for _, url in asked] == urls * (root == FAR)

    asyncio.run(whole())


def test_a_proxy_that_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def whole() -> None:
        async with proxied(monkeypatch) as (heads, _), connections(10, None) as http:
            with pytest.raises(InputError, match=r"far\.invalid/v1/models cannot be reached .*502"):
                await served_model(http, "https://far.invalid/v1", None)
            assert heads[0].startswith("CONNECT far.invalid:443 ")

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a.b:1/v1", "http://p:1"), ("https://a.b", "http://q"), ("http://own.net", None),
        ("http://x.own.net:5", None), ("http://c:80/v1", None), ("http://c:81/v1", "http://p:1"),
        ("http://127.0.0.2:1", None), ("http://[::1]:1", None), ("http://localhost", None),
        ("http://0.0.0.0:1", None),
    ],
)  # fmt: skip
def test_which_proxy(url: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "p:1")
    monkeypatch.setenv("https_proxy", "http://q")
    monkeypatch.setenv("no_proxy", ".own.net,own.net,c:80")
    assert proxy_of(url) == expected


def test_a_proxy_of_another_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://me:secret@p:1")
    monkeypatch.setenv("all_proxy", "socks5://p:1")
    with pytest.raises(InputError, match=r"_proxy begins with socks5://.*no_proxy=a\.b") as told:
        proxy_of("https://a.b/v1")
    assert "secret" not in str(told.value)
    assert proxy_of("http://a.b/v1") is None
    assert aiohttp.ClientSession  # whose requests take none of it by themselves
