"""A server that speculates for real, one prompt at a time, and counts as SGLang or vLLM does.

    python tests/speculating_server.py --model M --draft FOLDER --port P [--speaks sglang|vllm]
        [--draft-class specforge_exp.drafts.eagle3.Eagle3] [--chain 5]
        [--fails never|at-once|later|midway] [--tells nothing|summary|detailed]

An empty --draft answers with the target alone. /v1/chat/completions renders and spells for itself.
"""

import argparse
import asyncio
import json
import os
import queue
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # in a container nothing is installed

import torch
from aiohttp import web
from transformers import AutoTokenizer

from specforge_exp.bench.speculative import Decoding, Generation, generate, speculate
from specforge_exp.config import ModelConfig, draft_config_class, locate
from specforge_exp.data.rendering import Spelling, prompt_ids
from specforge_exp.target import load_target


class Watched:
    """A decoder that tells what each verification yields."""

    def __init__(self, decoder: Any, prompt: int, told: "queue.Queue[list[int] | None]") -> None:
        self.decoder, self.prompt, self.told = decoder, prompt, told

    def commit(self, aux_1SA: torch.Tensor, next_tokens: list[int]) -> None:
        self.decoder.commit(aux_1SA, next_tokens)
        self.told.put(next_tokens[self.prompt - 1 :])
        self.prompt = 1

    def propose(self, length: int, choose: Any) -> Any:
        return self.decoder.propose(length, choose)


class Server:
    """The routes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.asked, self.under_way, self.most = args, 0, 0, 0
        self.drafts = 0
        self.kept: list[int] = [0] * args.chain
        kind = locate(args.draft_class)
        options = {"block_size": args.chain + 1, "num_features": 3}
        draft_cfg = draft_config_class(args.draft_class)(
            **options if "DFlash" in args.draft_class else {}
        )
        feeds = partial(kind.target_layers, draft_cfg)
        model = ModelConfig(name="m", path=args.model)
        self.target = load_target(model, torch.device("cpu"), feeds=feeds)
        self.draft = kind.load(Path(args.draft), self.target) if args.draft else None
        self.lock = threading.Lock()

    def answer(self, ids: list[int], decoding: Decoding, told: Any) -> Generation:
        with self.lock:
            try:
                if self.draft is None:
                    single = generate(self.target, ids, decoding)
                    told.put(single.tokens)
                    return single
                watched = Watched(self.draft.decoder(), len(ids), told)
                return speculate(self.target, watched, self.draft.draft_ids_D, ids, decoding)
            finally:
                told.put(None)

    async def stream(self, http: web.Request, ids: list[int], decoding: Decoding) -> Any:
        """Pieces of the answer as they come, and at the end its Generation."""
        self.asked += 1
        if self.args.fails == "later" and self.asked > 2:
            print("out of memory, says the server", flush=True)
            os._exit(9)
        told: queue.Queue[list[int] | None] = queue.Queue()
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(None, self.answer, ids, decoding, told)
        sent = 0
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        while (piece := await loop.run_in_executor(None, told.get)) is not None:
            for number, token in enumerate(piece):
                if token in decoding.eos:
                    piece = piece[: number + 1]
                    break
            piece = piece[: decoding.max_tokens - sent]
            sent += len(piece)
            yield piece
        self.under_way -= 1
        yield await work

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """SGLang's own interface: every event has the whole answer so far."""
        body = await http.json()
        sampling = body["sampling_params"]
        eos = frozenset(sampling["stop_token_ids"])
        decoding = Decoding(
            sampling["max_new_tokens"], self.args.chain, sampling["temperature"], eos
        )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        tokens: list[int] = []
        async for piece in self.stream(http, body["input_ids"], decoding):
            meta: dict[str, Any] = {"id": str(self.asked)}
            if isinstance(piece, Generation):
                meta["finish_reason"] = {"type": "stop"}
                if self.draft is not None:
                    counts = [piece.accepted.count(n) for n in range(self.args.chain + 1)]
                    meta["spec_verify_ct"] = len(piece.accepted)
                    meta["spec_correct_drafts_histogram"] = counts
            else:
                tokens = [*tokens, *piece]
            meta["completion_tokens"] = len(tokens)
            event = {"text": "", "output_ids": tokens, "meta_info": meta}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """OpenAI's, as vLLM has it."""
        body = await http.json()
        eos = frozenset(body["stop_token_ids"])
        decoding = Decoding(body["max_tokens"], self.args.chain, body["temperature"], eos)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        async for piece in self.stream(http, body["prompt"], decoding):
            choice: dict[str, Any] = {"index": 0, "text": "", "token_ids": []}
            more: dict[str, Any] = {}
            if isinstance(piece, Generation):
                choice["finish_reason"] = "stop"
                self.drafts += len(piece.accepted)
                for accepted in piece.accepted:
                    for position in range(accepted):
                        self.kept[position] += 1
                if self.draft is not None and self.args.tells != "nothing":
                    counts = [piece.accepted.count(n) for n in range(self.args.chain + 1)]
                    told = {"acceptance_histogram": counts, "num_spec_steps": len(piece.accepted)}
                    if self.args.tells == "detailed":
                        told["per_step_accepted"] = piece.accepted
                    more = {"metrics": {"speculative_decoding": told}}
            else:
                choice |= {"token_ids": piece, "text": "x"}
            event = {"choices": [choice], **more}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def chat(self, http: web.Request) -> web.StreamResponse:
        """OpenAI's chat, streamed."""
        body = await http.json()
        tokenizer = AutoTokenizer.from_pretrained(self.args.model)
        ids, eos = prompt_ids(tokenizer, body["messages"], {}), tokenizer.eos_token_id
        decoding = Decoding(
            body["max_tokens"],
            self.args.chain,
            body["temperature"],
            frozenset({eos}),
            body["top_p"],
        )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        spelling = Spelling(tokenizer)
        async for piece in self.stream(http, ids, decoding):
            choice: dict[str, Any] = {"index": 0, "delta": {}}
            event: dict[str, Any] = {"choices": [choice]}
            if isinstance(piece, Generation):
                choice["finish_reason"] = "stop" if piece.tokens[-1] == eos else "length"
                event["usage"] = {"completion_tokens": len(piece.tokens)}
            else:
                choice["delta"] = {"content": "".join(map(spelling.add, piece))}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if self.args.fails == "midway" and body["messages"][-1]["content"] == "die":
                os._exit(9)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def metrics(self, _: web.Request) -> web.Response:
        labels = 'engine="0",model_name="tiny"'
        lines = [f"vllm:num_requests_running{{{labels}}} 0.0"]
        if self.draft is not None:
            lines.append(f"vllm:spec_decode_num_drafts_total{{{labels}}} {self.drafts}.0")
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines += [
                f'{name}{{{labels},position="{n}"}} {kept}.0' for n, kept in enumerate(self.kept)
            ]
        return web.Response(text="\n".join(lines) + "\n")

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": self.args.model, "most": self.most})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()


def main() -> None:
    """Listen until killed."""
    parser = argparse.ArgumentParser()
    for name in ("model", "draft"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--speaks", default="sglang")
    parser.add_argument("--draft-class", default="specforge_exp.drafts.eagle3.Eagle3")
    parser.add_argument("--chain", type=int, default=5)
    parser.add_argument("--fails", default="never")
    parser.add_argument("--tells", default="nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pids = [os.getpid()]
    if args.fails in ("at-once", "later"):  # with something that leaves its process group
        pids.append(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid)
    print("pids", *pids, flush=True)
    if args.fails == "at-once":
        sys.exit("no such kernel, says the server")
    server = Server(args)
    app = web.Application(client_max_size=64 << 20)
    if args.speaks == "sglang":
        app.router.add_post("/generate", server.generate)
        app.router.add_get("/model_info", server.info)
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/metrics", server.metrics)
    app.router.add_get("/health", server.health)
    print(f"listening after {time.process_time():.1f} s", flush=True)
    web.run_app(app, host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()
