"""Answers from OpenAI-compatible servers, which may be busy, slow, wrong or gone for a while."""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import orjson

from specforge_exp.config import Config
from specforge_exp.data.conversations import encode
from specforge_exp.data.messages import readable, reasoning_of
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import (
    Answer,
    Failed,
    Message,
    Refused,
    Request,
    ServerDied,
    Unreachable,
)
from specforge_exp.serving.server import connections, proxy_of

T = TypeVar("T")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
OFF = {"top_k": 0, "min_p": 0.0, "ignore_eos": False, "repetition_penalty": 1.0}
"""Settings that are not sent with this value: OpenAI's own servers know none of them."""
BROKEN = ("abort", "error", "content_filter", "repetition")
"""Why an answer ended where the model would have gone on, other than at max_tokens."""
BUSY = (429, 502, 503, 504)
SETTINGS = (401, 403, 404)
FIRST_CONTACT = 10.0
"""Seconds after which a server that has never answered is given up."""


class Busy(Exception):
    """The server has no room now, or cannot be reached; wait, then ask again."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class OpenAIEngine:
    """Asks one server or several.

    Args:
        cfg: engine.timeout, retries, patience, served_name and api_key count.
        urls: base URLs that end in /v1.
        gone: True for a server (by its index) that has ended and will not come back by itself.
    """

    def __init__(
        self, cfg: Config, urls: list[str], gone: Callable[[int], bool] = lambda server: False
    ) -> None:
        self.cfg, self.options = cfg, cfg.engine
        self.urls = [url.rstrip("/") for url in urls]
        self.gone = gone
        self.names: dict[int, asyncio.Task[str]] = {}
        """The model's name on each server: the first contact, for which all requests wait."""
        self.alive = [0.0] * len(urls)
        """When each server last answered anything."""

    @property
    def servers(self) -> int:
        """As `Engine.servers`."""
        return len(self.urls)

    @cached_property
    def session(self) -> aiohttp.ClientSession:
        """The connections; opened by the loop that uses them."""
        return connections(self.options.timeout, os.environ.get(self.options.api_key))

    async def close(self) -> None:
        """Close the connections."""
        for contact in self.names.values():
            contact.cancel()
        if "session" in vars(self):  # it was opened
            await self.session.close()

    async def answer(self, request: Request) -> Answer:
        """As `Engine.answer`."""
        server = request.server % len(self.urls)
        if server not in self.names:
            first = self.patiently(server, lambda: self.name_of(server))
            self.names[server] = asyncio.create_task(first)
        contact = self.names[server]
        try:
            await asyncio.shield(contact)
        except (InputError, ServerDied, Failed, Refused):
            if self.names.get(server) is contact:  # whoever asks later tries again
                del self.names[server]
            raise
        for attempt in range(self.options.retries):
            with suppress(Failed):
                return await self.patiently(server, lambda: self.once(server, request))
            await asyncio.sleep(pause(attempt))
        return await self.patiently(server, lambda: self.once(server, request))

    async def patiently(self, server: int, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until the server has room; raises Unreachable after engine.patience, ServerDied."""
        began = time.monotonic()
        tries = 0
        while True:
            try:
                answer = await ask()
                self.alive[server] = time.monotonic()
                return answer
            except Busy as error:
                if self.gone(server):
                    raise ServerDied from None
                waited = time.monotonic() - max(self.alive[server], began)
                patience = self.options.patience
                if not self.alive[server]:
                    patience = min(patience, FIRST_CONTACT)
                if waited > patience:
                    raise Unreachable(
                        f"{self.urls[server]}: {error}, for {waited:.0f} s; what is done is kept: "
                        "mend the server or engine.urls, then run the same command again"
                    ) from None
                await asyncio.sleep(error.seconds or pause(tries))
                tries += 1

    async def post(self, server: int, path: str, body: bytes | None, session: str = "") -> bytes:
        """One exchange; raises Busy, Refused, Failed or InputError."""
        url = self.urls[server] + path
        headers, proxy = {"Content-Type": "application/json"}, proxy_of(url)
        if session:
            headers["Modal-Session-ID"] = session
        try:
            method = "GET" if body is None else "POST"
            async with self.session.request(
                method, url, data=body, headers=headers, proxy=proxy
            ) as response:
                content = await response.read()
        except aiohttp.ConnectionTimeoutError:
            raise Busy("it cannot be reached (time-out)") from None
        except TimeoutError:
            raise Failed(f"no answer within engine.timeout={self.options.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Busy(f"it cannot be reached ({type(error).__name__}: {error})") from None
        if response.status == 200:
            return content
        why = f"HTTP {response.status}: {complaint(content)}"
        if response.status in BUSY:
            after = response.headers.get("Retry-After", "")
            raise Busy(f"it is too busy ({why})", float(after) if after.isdigit() else None)
        if response.status in SETTINGS:
            raise InputError(
                f"{url}: {why}; check engine.urls, engine.served_name and ${self.options.api_key}"
            )
        raise Failed(why) if response.status >= 500 else Refused(why)

    async def name_of(self, server: int) -> str:
        """The name under which the server knows the target."""
        if self.options.served_name:
            return self.options.served_name
        content = await self.post(server, "/models", None)
        try:
            names = [str(model["id"]) for model in orjson.loads(content)["data"]]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.urls[server]}/models is not OpenAI's; set served_name"
            ) from None
        if len(names) != 1:
            raise InputError(f"{self.urls[server]} serves {names}; choose one: engine.served_name")
        target = self.cfg.model.path
        ours = self.options.name != "openai"  # which we have started with this model
        if not ours and Path(names[0]).name.lower() != Path(target).name.lower():
            raise InputError(
                f"{self.urls[server]} serves {names[0]}, not model.path={target}; if both are the "
                f"same model, say so: engine.served_name={names[0]}"
            )
        return names[0]

    async def once(self, server: int, request: Request) -> Answer:
        """One attempt at an answer."""
        body: dict[str, Any] = {
            "model": self.names[server].result(),
            "messages": list(map(sent, request.messages)),
            "seed": request.seed,
        }
        for name, value in vars(request.sampling).items():
            if name != "off" and (value != OFF.get(name) or name in request.sampling.off):
                body[name] = value
        if body.get("top_k") == 0:
            body["top_k"] = -1  # what servers call off
        if request.special_tokens:
            body["skip_special_tokens"] = False
        if request.tools:
            body["tools"] = request.tools
        if request.template_kwargs:
            body["chat_template_kwargs"] = request.template_kwargs
            if effort := request.template_kwargs.get("reasoning_effort"):
                body["reasoning_effort"] = effort  # vLLM's gpt-oss takes it from nowhere else
        content = await self.post(server, "/chat/completions", orjson.dumps(body), request.session)
        return parse(content)


def sent(message: Message) -> Message:
    """A message as OpenAI's interface has it, where the arguments of a call are text: servers make
    objects of them for their templates. Raises Unrenderable.

    Calls and results have ids there. An empty one is what a template makes of none.
    """
    shown = readable(message, "in")
    if shown["role"] == "tool":
        shown = {**shown, "tool_call_id": str(shown.get("tool_call_id") or "")}
    for call in shown.get("tool_calls", []) if shown["role"] == "assistant" else []:
        inner = call.get("function", call)
        text = encode(inner["arguments"]).decode()
        call |= {"type": "function", "function": {**inner, "arguments": text}}
        call["id"] = str(call.get("id") or "")
    return {key: shown[key] for key in MESSAGE_KEYS if key in shown}


def parse(content: bytes) -> Answer:
    """The answer in a response; raises Failed when it is none, or was broken off."""
    try:
        response = orjson.loads(content)
        choice = response["choices"][0]
        given = choice["message"]
        message: Message = {"role": "assistant", "content": given.get("content") or ""}
        if thoughts := reasoning_of(given):  # servers differ in what they call them
            message["reasoning_content"] = thoughts
        if given.get("tool_calls"):
            message["tool_calls"] = given["tool_calls"]
        if not isinstance(message["content"], str):
            raise TypeError("its content is not text")
        usage = response.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        if (reason := str(choice["finish_reason"])) in BROKEN:
            raise Failed(f"it was broken off: {reason}")
        return Answer(
            message, reason, int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0), int(details.get("cached_tokens") or 0),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise Failed(
            f"the server's answer is malformed ({type(error).__name__}: {error})"
        ) from None


def complaint(content: bytes) -> str:
    """What an error response says, in one line."""
    try:
        body = orjson.loads(content)
        body = body.get("error", body)
        text = body.get("message", body) if isinstance(body, dict) else body
    except (ValueError, AttributeError):
        text = content.decode(errors="replace")
    return " ".join(str(text).split())[:300]


def pause(attempt: int) -> float:
    """Seconds before the next attempt: doubling up to 30, anywhere between 0 and that."""
    return random.uniform(0, min(30.0, 0.5 * 2**attempt))
