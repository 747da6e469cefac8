"""The engine in this process: its answers are those of the model alone, or it says why not."""

import asyncio
from typing import Any

import pytest
from conftest import engine_over
from families import FAMILIES, build, tokens

from specforge_exp.config import Config
from specforge_exp.generation.engine import Refused, Request, Sampling
from specforge_exp.generation.local.batcher import Generated
from specforge_exp.target import Target


def test_a_long_neighbour_changes_no_answer(cfg: Config, tiny_tokenizer: Any) -> None:
    """Phi's rotation is another one for all of a forward when one of it is long: such a one is
    refused."""
    model = build(FAMILIES["Phi-4-mini"]()).eval().requires_grad_(False)
    engine = engine_over(cfg, Target(model, []), tiny_tokenizer, cache_mb=0)
    batcher, sampling = engine.batcher, Sampling(max_tokens=24, ignore_eos=True)
    short, longest = tokens(20, 1).tolist(), tokens(104, 2).tolist()

    async def scene() -> None:
        alone = await batcher.generate(short, sampling, 0)
        beside, _ = await asyncio.gather(
            *(batcher.generate(x, sampling, 0) for x in (short, longest))
        )
        assert beside.ids == alone.ids
        with pytest.raises(Refused, match="the context of 128 tokens"):
            await batcher.generate(tokens(150, 2).tolist(), sampling, 0)
        await engine.close()

    asyncio.run(scene())


def test_what_the_text_would_lose_is_said(
    cfg: Config, tiny_target: Target, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Special tokens within an answer (channels of thoughts, calls of tools) are not spelt."""
    engine = engine_over(cfg, tiny_target, tiny_tokenizer, cache_mb=1)
    said = tiny_tokenizer("<|im_start|>analysis", add_special_tokens=False)["input_ids"]
    request = Request([{"role": "user", "content": "?"}], Sampling())

    async def scene(ids: list[int], reason: str) -> str:
        async def generate(*_: Any) -> Generated:
            return Generated(ids, reason, 0)

        monkeypatch.setattr(engine.batcher, "generate", generate)
        return str((await engine.answer(request)).message["content"])

    with pytest.raises(Refused, match=r"holds <\|im_start\|>, which its text would lose"):
        asyncio.run(scene([*said, 2], "stop"))
    assert asyncio.run(scene([*said[1:], 2], "stop")) == "analysis"
    asyncio.run(engine.close())
