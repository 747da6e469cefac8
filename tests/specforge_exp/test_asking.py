"""How bench asks: the seeds of what a server samples, and whose counts they are."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from chat_shapes import SHAPES
from chat_templates import tokenizer_of

from specforge_exp.bench import clients
from specforge_exp.bench.acceptance import ngram_keys
from specforge_exp.bench.asking import Asking, Talk, asking_of, heading_of
from specforge_exp.bench.served import Exchange, carry_out, converse, repeat, together
from specforge_exp.bench.sets import BenchSets
from specforge_exp.bench.speculative import Decoding, Generation
from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.serving.server import connections
from specforge_exp.stages.bench import fitting
from specforge_exp.target import load_tokenizer


def test_samples_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer has a seed of its own, which follows from `seed` and its place alone."""
    bodies: list[dict[str, Any]] = []

    async def pieces(http: Any, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        bodies.append(body)
        yield {
            "output_ids": [5, 6], "meta_info": {"completion_tokens": 2, "spec_verify_ct": 0},
            "choices": [{"token_ids": [5, 6]}],
        }  # fmt: skip

    async def counters(http: Any, root: str) -> dict[str, float]:
        return {}

    monkeypatch.setattr(clients, "pieces", pieces)
    monkeypatch.setattr(clients, "counters", counters)
    speaking: dict[str, clients.Client] = {
        "sampling_seed": clients.sglang(None, "a"),  # type: ignore[arg-type]
        "seed": clients.openai(None, "a", "m", False),  # type: ignore[arg-type]
    }

    def seeds(name: str, seed: int, temperature: float, order: list[int]) -> dict[Any, Any]:
        """By conversation and whether alone, those of its two turns."""
        tokenizer: Any = SimpleNamespace(decode=lambda *_, **__: "")
        asking = Asking(tokenizer, Decoding(4, temperature=temperature), {}, None, 9, seed)
        monkeypatch.setattr(Asking, "encode", lambda self, messages, tools: [1])
        found: dict[Any, Any] = {}
        for number in order:
            bodies.clear()
            asks = [[{"role": "user", "content": "a"}]] * 2
            talk = Talk(asks)
            turns = asyncio.run(converse(speaking[name], asking, talk, f"set/{number}"))
            asyncio.run(repeat(speaking[name], asking, turns, f"set/{number}"))
            said = [body.get("sampling_params", body).get(name) for body in bodies]
            found |= {(number, False): said[:2], (number, True): said[2:]}
        return found

    for name in speaking:
        own = seeds(name, 0, 1.0, [0, 1])
        every = [seed for turns in own.values() for seed in turns]
        assert len(every) == len(set(every)) == 8 and all(0 <= seed < 2**31 for seed in every)
        assert seeds(name, 0, 1.0, [1, 0]) == own
        others = [seed for turns in seeds(name, 1, 1.0, [0, 1]).values() for seed in turns]
        assert not set(every) & set(others)
        assert seeds(name, 0, 0.0, [0]) == {(0, False): [None] * 2, (0, True): [None] * 2}


def exchange(*tokens: int, verified: int = 0) -> Exchange:
    return Exchange([9], clients.ServedAnswer(Generation(list(tokens), 1.0), verified))


def test_both_ways_stand_beside_each_other() -> None:
    """By conversation and turn; the target's own answer, where there is one, tells what is new."""
    drafted = [[exchange(1, verified=3), exchange(2)], [exchange(3, verified=4)]], 2.5
    alone = [[exchange(11), exchange(*range(8))], [exchange(13)]], 7.5
    asking: Any = SimpleNamespace(training_keys=ngram_keys(torch.arange(8)))
    found = together(drafted, alone, asking)
    told = [(r.with_draft.tokens, r.alone and r.alone.tokens, r.follows, r.verified, r.overlap)
            for r in found.requests]  # fmt: skip
    assert told == [
        ([1], [11], False, 3, 0.0), ([2], [*range(8)], True, 0, 1.0), ([3], [13], False, 4, 0.0),
    ]  # fmt: skip
    assert (found.seconds, found.seconds_alone) == (2.5, 7.5)
    without = together(([[exchange(*range(8))]], 2.5), None, asking)
    assert without.requests[0].overlap == 1.0 and without.seconds_alone is None


def test_answers_keep_their_places_whoever_is_first() -> None:
    """Four conversations, two at a time, the first of them the slowest."""
    under_way = most = 0

    async def talk(number: int) -> list[Exchange]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(20 - 5 * number):
            await asyncio.sleep(0)
        under_way -= 1
        return [exchange(number)]

    found, seconds = asyncio.run(carry_out("x", [partial(talk, n) for n in range(4)], 2))
    assert [turns[0].answer.generation.tokens for turns in found] == [[0], [1], [2], [3]]
    assert most == 2 and 0 < seconds < 60


@pytest.mark.parametrize("others", [0, 3])
def test_what_others_ask_meanwhile_is_noticed(others: int) -> None:
    """vLLM's /metrics counts the verifications of all requests together."""
    drafts, tokens, labels = 7, 100, '{engine="0"}'

    async def completions(_: web.Request) -> web.Response:
        nonlocal drafts, tokens
        drafts, tokens = drafts + 2, tokens + 5 + others
        event = {"choices": [{"token_ids": [1, 2, 3, 4, 5], "text": "x"}]}
        return web.Response(text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")

    async def metrics(_: web.Request) -> web.Response:
        counts = {"spec_decode_num_drafts_total": drafts, "generation_tokens_total": tokens}
        lines = [f"vllm:{name}{labels} {count}.0\n" for name, count in counts.items()]
        return web.Response(
            text="".join([*lines, f"vllm:generation_tokens_created{labels} 1.7e9\n"])
        )

    async def asked() -> clients.ServedAnswer:
        app = web.Application()
        app.router.add_post("/v1/completions", completions)
        app.router.add_get("/metrics", metrics)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with connections(60.0, None) as http:
                root = f"http://127.0.0.1:{runner.addresses[0][1]}"
                return await clients.openai(http, root, "m", False)([1], Decoding(5))
        finally:
            await runner.cleanup()

    if others:
        with pytest.raises(InputError, match="others were under way"):
            asyncio.run(asked())
        return
    assert asyncio.run(asked()).verified == 2


def test_a_prompt_has_its_tools_and_may_be_refused(
    cfg: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """As regen asks it; what the template refuses (a system's words, as Gemma) is left out."""
    tokenizer = load_tokenizer(cfg.model)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{{ messages[0].content }}"
    )
    asking = asking_of(cfg, tokenizer, None)
    plain, refused = ({"conversations": [{"role": r, "content": "Hi"}]} for r in ("user", "system"))
    refused["conversations"] += plain["conversations"]
    told = {**plain, "tools": [{"function": {"name": "weather "}}]}
    ask, _ = fitting(BenchSets({"x": [told, plain, refused]}, {}), asking, cfg)["x"]
    assert tokenizer.decode(asking.encode(ask.asks[0], ask.tools)) == "weather Hi"
    assert "a prompt is left out: the chat template refuses it: no system role" in caplog.text
    with pytest.raises(InputError, match="no prompt fits"):
        fitting(BenchSets({"x": [refused]}, {}), asking, cfg)


def test_how_is_asked_follows_the_options(cfg: Config) -> None:
    tokenizer = load_tokenizer(cfg.model)
    cfg.seed, cfg.max_length, cfg.bench.max_tokens = 5, 900, 100
    asking = asking_of(cfg, tokenizer, None)
    assert (asking.room, asking.seed, asking.decoding.verify_cost) == (800, 5, None)
    cfg.bench.max_length, cfg.bench.verify, cfg.bench.verify_cost = 500, "confidence", 0.25
    asking = asking_of(cfg, tokenizer, None)
    assert (asking.room, asking.decoding.verify_cost) == (400, 0.25)


@pytest.mark.parametrize(("length", "asked"), [(0, 0), (9, 2), (10, 0)])
def test_what_has_no_room_is_not_asked(
    length: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what the template refuses; a prompt may fill its room."""
    monkeypatch.setattr(Asking, "encode", lambda self, messages, tools: [1] * length)
    tokenizer: Any = SimpleNamespace(decode=lambda *_, **__: "")

    async def client(prompt: list[int], decoding: Decoding) -> clients.ServedAnswer:
        return exchange(2).answer

    own = Asking(tokenizer, Decoding(4), {}, None, 9, 0)
    talk = Talk([[{"role": "user", "content": "a"}]] * 2)
    assert len(asyncio.run(converse(client, own, talk, "x"))) == asked


def test_prompts_are_the_same_tomorrow(cfg: Config) -> None:
    """What two days' benches compare is not the date in a template."""
    tokenizer = load_tokenizer(cfg.model)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }} {{ messages[0].content }}"
    prompt = asking_of(cfg, tokenizer, None).encode([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(prompt) == "01 January 2025 Hi"


def test_an_answer_is_what_stands_behind_its_header() -> None:
    """The words of Harmony's channels are no answer; a model without a header has said it all."""

    def decoded(name: str, text: str) -> str:
        shape = next(shape for shape in SHAPES if shape.name == name)
        tokenizer = tokenizer_of(shape)
        heading = heading_of(tokenizer, shape.kwargs)
        asking = Asking(tokenizer, Decoding(4), shape.kwargs, None, 9, 0, heading)
        return asking.decode(tokenizer(text, add_special_tokens=False)["input_ids"])

    thought = "<|channel|>analysis<|message|>Hm."
    final = "<|start|>assistant<|channel|>final<|message|>"
    assert decoded("gpt-oss", f"{thought}<|end|>{final}Yes, final.<|return|>") == "Yes, final."
    assert decoded("gpt-oss", thought) == ""
    assert decoded("gpt-oss", "Yes.") == "Yes."
    assert decoded("Cohere 2", "<|START_RESPONSE|>Yes.<|END_RESPONSE|>") == "Yes."
    assert decoded("Gemma 4", "<|channel>thought\nHm.\n<channel|>Yes.<turn|>") == "Yes."
    assert decoded("Gemma 4", "<|channel>thought\nHm.") == ""
    assert decoded("gpt-oss", f"{final}No.<|end|>{final}Yes.") == "Yes."
    assert decoded("gpt-oss", "final.") == "final."
    assert decoded("GLM-4", "\nYes.\nNo.") == "\nYes.\nNo."
    thoughts = "<|channel>thought\nHm.\n<channel|>"
    assert decoded("Gemma 4", f"{thoughts}No.{thoughts}Yes.<turn|>") == "Yes."
    assert decoded("Gemma 4", "Yes.<turn|>") == "Yes."
    assert decoded("Llama 3", "Yes.<|eot_id|>") == "Yes."
