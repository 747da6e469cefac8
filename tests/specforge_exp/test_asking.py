"""How bench asks: the seeds of what a server samples."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from specforge_exp.bench import clients
from specforge_exp.bench.asking import Asking
from specforge_exp.bench.served import converse, repeat
from specforge_exp.bench.speculative import Decoding


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
        monkeypatch.setattr(Asking, "encode", lambda self, messages: [1])
        found: dict[Any, Any] = {}
        for number in order:
            bodies.clear()
            asks = [[{"role": "user", "content": "a"}]] * 2
            turns = asyncio.run(converse(speaking[name], asking, asks, f"set/{number}"))
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
