"""Answers by an OpenAI-compatible server, as they come."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Generator
from typing import Any

from specforge_exp.bench.clients import pieces, served_model
from specforge_exp.chat.dialogue import Dialogue, Piece, Spoken
from specforge_exp.config import Config
from specforge_exp.data.messages import reasoning_of
from specforge_exp.errors import InputError
from specforge_exp.serving.server import connections


class RemoteModel:
    """A server, which is asked for the first time when there is something to answer."""

    def __init__(self, cfg: Config) -> None:
        self.engine, self.url = cfg.engine, str(cfg.chat.url).rstrip("/")

    def answer(self, dialogue: Dialogue) -> Generator[Spoken]:
        """As `Answering`; every answer has a connection of its own."""
        spoken, began, finish = Spoken(unit="pieces"), time.perf_counter(), None
        with asyncio.Runner() as runner:  # it takes a Ctrl-C to the task that waits
            events = self.events(dialogue)
            try:
                while event := runner.run(following(events)):
                    finish = hear(spoken, event) or finish
                    spoken.seconds = time.perf_counter() - began
                    if spoken.tokens:
                        spoken.first_seconds = spoken.first_seconds or spoken.seconds
                    yield spoken
            except (AttributeError, TypeError, ValueError, LookupError) as error:
                raise InputError(f"{self.url}: its stream is not OpenAI's ({error})") from None
            finally:
                runner.run(events.aclose())
        if finish is None:
            raise InputError(f"{self.url} broke the answer off")
        spoken.end = "" if finish == "stop" else f"ended by the server: {finish}"
        yield spoken

    async def events(self, dialogue: Dialogue) -> AsyncGenerator[dict[str, Any]]:
        """The events of one answer; InputError."""
        engine, own = self.engine, dialogue.settings
        async with connections(engine.timeout, os.environ.get(engine.api_key)) as http:
            model = engine.served_name or await served_model(http, self.url, None)
            body = {
                "model": model, "messages": dialogue.whole, "temperature": own.temperature,
                "top_p": own.top_p, "max_tokens": own.max_tokens, "stream": True,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
            async for event in pieces(http, f"{self.url}/chat/completions", body):
                yield event


async def following(events: AsyncGenerator[dict[str, Any]]) -> dict[str, Any] | None:
    """The next event; None after the last."""
    return await anext(events, None)


def hear(spoken: Spoken, event: dict[str, Any]) -> str | None:
    """Take an event into an answer; why the answer has ended, if it has."""
    choice = (event.get("choices") or [{}])[0]
    delta = choice.get("delta") or {}
    texts = {"thought": reasoning_of(delta), "own": delta.get("content") or ""}
    spoken.pieces += [Piece(text, kind) for kind, text in texts.items() if text]
    spoken.tokens += any(texts.values())
    if counted := (event.get("usage") or {}).get("completion_tokens"):
        spoken.tokens, spoken.unit = int(counted), "tokens"
    reason: str | None = choice.get("finish_reason")
    return reason
