"""An OpenAI-compatible server for one model on this machine, for tests, laptops and small targets.

    python -m specforge_exp.generation.local.serve --model assets/tiny_target --port 30000

SIGTERM or Ctrl-C: no new requests, those under way are finished, exit.
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson

from specforge_exp.data.messages import Unrenderable
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import Answer, Failed, Refused, Request, Sampling

if TYPE_CHECKING:
    from aiohttp import web

    from specforge_exp.generation.local.transformers_engine import TransformersEngine

NUMBERS: dict[str, tuple[Any, float, float]] = {
    "temperature": ((int, float), 0, 100),
    "top_p": ((int, float), 1e-9, 1),
    "top_k": (int, -1, 1 << 31),
    "min_p": ((int, float), 0, 1),
    "repetition_penalty": ((int, float), 1e-9, 100),
    "max_tokens": (int, 1, 1 << 31),
    "max_completion_tokens": (int, 1, 1 << 31),
    "seed": (int, -(1 << 63), 1 << 64),
    "n": (int, 1, 1),
}
"""Types and bounds of the numbers in a request."""
UNSERVED = (
    "stop", "stop_token_ids", "logit_bias", "presence_penalty", "frequency_penalty", "min_tokens",
    "logprobs", "response_format",
)  # fmt: skip
"""Fields that would change an answer, unless they are empty or 0."""
DRAIN = 86400.0
"""Seconds that answers under way may take after SIGTERM."""


class BadField(ValueError):
    """A request that is not understood; the message names the field and what is valid."""


def parse(body: Any) -> Request:
    """A request from the body of /v1/chat/completions; fields that nobody knows are ignored.

    Raises:
        BadField: a known field has a wrong type or value, or asks for what is not served.
    """
    if not isinstance(body, dict):
        raise BadField("the body must be an object with messages")
    numbers: dict[str, Any] = {}
    for name, (kinds, least, most) in NUMBERS.items():
        if (value := body.get(name)) is None:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            raise BadField(f"{name}={value!r} must be a number from {least} to {most}")
        numbers[name] = value
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadField("messages must be a list of at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadField(f"messages[{number}] must be an object with role and content")
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if not isinstance(body.get(name), kind | None):
            raise BadField(f"{name} must be {'a list' if kind is list else 'an object'}")
    if body.get("stream"):
        raise BadField("stream=true is not supported; answers come whole")
    if unserved := [name for name in UNSERVED if body.get(name)]:
        raise BadField(f"{unserved[0]}={body[unserved[0]]!r} is not supported; leave it out")
    sampling = Sampling(
        numbers.get("temperature", 1.0),
        numbers.get("top_p", 1.0),
        max(0, numbers.get("top_k", 0)),
        numbers.get("min_p", 0.0),
        numbers.get("max_completion_tokens", numbers.get("max_tokens", 1 << 31)),
        bool(body.get("ignore_eos")),
        numbers.get("repetition_penalty", 1.0),
    )
    return Request(
        messages,
        sampling,
        numbers.get("seed", random.getrandbits(63)),
        body.get("tools"),
        body.get("chat_template_kwargs") or {},
    )


class ChatServer:
    """The routes over one engine.

    Args:
        engine: answers.
        name: of the model, as it is listed.
        max_queue: requests that may wait for a slot; further ones get 503.
    """

    def __init__(self, engine: "TransformersEngine", name: str, max_queue: int) -> None:
        self.engine, self.name, self.max_queue = engine, name, max_queue
        self.under_way = 0
        self.closing = False
        self.counts: Counter[str] = Counter()

    def app(self) -> "web.Application":
        """The application for aiohttp."""
        from aiohttp import web

        app = web.Application(client_max_size=64 << 20)
        app.add_routes([
            web.post("/v1/chat/completions", self.chat),
            web.get("/health", self.health),
            web.get("/v1/models", self.models),
            web.get("/get_server_info", self.info),
            web.get("/get_model_info", self.info),
            web.get("/metrics", self.metrics),
        ])  # fmt: skip
        return app

    async def chat(self, http: "web.Request") -> "web.Response":
        """One answer, or an error in OpenAI's form."""
        batcher = self.engine.batcher
        if self.closing:
            return problem(503, "the server is stopping", {"Connection": "close"})
        if self.under_way >= batcher.slots.count + self.max_queue:
            self.counts["busy"] += 1
            return problem(503, f"{self.max_queue} requests wait already", {"Retry-After": "1"})
        self.under_way += 1
        try:
            request = parse(orjson.loads(await http.read()))
            answer = await self.engine.answer(request)
        except orjson.JSONDecodeError as error:
            return problem(400, f"the body is not JSON: {error}")
        except (BadField, Refused, Unrenderable) as error:
            return problem(400, str(error))
        except Failed as error:
            return problem(500, str(error))
        finally:
            self.under_way -= 1
        self.counts["answers"] += 1
        return reply(completion(answer, self.name, self.counts["answers"]))

    async def health(self, _: "web.Request") -> "web.Response":
        """200 as long as requests are answered."""
        alive = self.engine.batcher.thread.is_alive() and not self.closing
        return reply({"status": "ok"}) if alive else problem(503, "the server is stopping")

    async def models(self, _: "web.Request") -> "web.Response":
        """The only model."""
        model = {
            "id": self.name,
            "object": "model",
            "owned_by": "specforge_exp",
            "max_model_len": self.engine.batcher.context,
        }
        return reply({"object": "list", "data": [model]})

    async def info(self, _: "web.Request") -> "web.Response":
        """What routers ask a worker for."""
        batcher = self.engine.batcher
        return reply(
            {
                "model_path": self.name,
                "served_model_name": self.name,
                "tokenizer_path": self.name,
                "is_generation": True,
                "context_length": batcher.context,
                "max_running_requests": batcher.slots.count,
                "max_queued_requests": self.max_queue,
                "tp_size": 1,
                "dp_size": 1,
            }
        )

    async def metrics(self, _: "web.Request") -> "web.Response":
        """Counts since the start, and what runs and waits now."""
        batcher = self.engine.batcher
        names = ("requests", "prompt_tokens", "cached_tokens", "generated_tokens")
        counts = {name: batcher.counts[name] for name in names}
        now = {"running": batcher.running, "waiting": len(batcher.waiting)}
        return reply(counts | now | {"refused_busy": self.counts["busy"]})


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> "web.Response":
    """A response with a JSON body."""
    from aiohttp import web

    return web.Response(
        body=orjson.dumps(body), status=status, headers=headers, content_type="application/json"
    )


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> "web.Response":
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return reply(
        {"error": {"message": message, "type": kind, "param": None, "code": status}},
        status,
        headers,
    )


def completion(answer: Answer, model: str, number: int) -> dict[str, Any]:
    """An answer in OpenAI's form."""
    choice = {"index": 0, "message": answer.message, "finish_reason": answer.finish_reason}
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m specforge_exp.generation.local.serve", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a causal model")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=30000, help="0: any free port, which is printed")
    add("--concurrency", type=int, default=64, help="sequences at a time")
    add("--context-length", type=int, help="most tokens of prompt and answer (default: model's)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--max-queue", type=int, default=1024, help="waiting requests beyond which 503 is said")
    add("--cache-mb", type=int, default=1024, help="memory for prefixes; 0: no cache")
    return parser


async def serve(args: argparse.Namespace) -> None:
    """Listen until SIGTERM or SIGINT, then finish what is under way.

    Raises:
        InputError: the model cannot be loaded or the port is taken.
    """
    from aiohttp import web

    from specforge_exp.config import Config, EngineConfig, ModelConfig
    from specforge_exp.generation.local.transformers_engine import TransformersEngine

    cfg = Config(
        model=ModelConfig(name="served", path=args.model, dtype=args.dtype),
        engine=EngineConfig(concurrency=args.concurrency),
        device=args.device,
        threads=args.threads,
    )
    engine = TransformersEngine(cfg, context=args.context_length, cache_mb=args.cache_mb)
    server = ChatServer(engine, args.model, args.max_queue)
    runner = web.AppRunner(
        server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=DRAIN
    )
    await runner.setup()
    site = web.TCPSite(runner, args.host, args.port)
    stop = asyncio.Event()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await site.start()
        except OSError as error:
            raise InputError(
                f"--port {args.port}: {error.strerror}; --port 0 takes a free one"
            ) from None
        host, port = runner.addresses[0][:2]
        print(f"listening on http://{host}:{port}", flush=True)
        await stop.wait()
    finally:
        server.closing = True
        await runner.cleanup()
        await engine.close()


def main() -> None:
    """Serve what the command line says."""
    try:
        asyncio.run(serve(options().parse_args()))
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
