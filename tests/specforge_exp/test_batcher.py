"""Continuous batching says what generate says, whatever else is in the batch or the cache."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count as counting
from threading import Event
from typing import Any

import pytest
import torch
from conftest import engine_over, small_target
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import Qwen3Config, Qwen3ForCausalLM

from specforge_exp.config import Config
from specforge_exp.data.chat import Unrenderable, prompt_ids
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import Failed, Refused, Request, Sampling
from specforge_exp.generation.local.batcher import Batcher, Generated
from specforge_exp.generation.local.prefixes import BLOCK, Prefixes
from specforge_exp.generation.local.sampling import choose
from specforge_exp.generation.local.slots import Slots
from specforge_exp.target import Target, load_tokenizer

DEADLINE = 300


@contextmanager
def batcher(model: Any, slots: int = 4, cache: int = 0, **options: Any) -> Iterator[Batcher]:
    context = model.config.max_position_embeddings
    made = Batcher(model, options.pop("eos", {1}), slots, context, cache)
    try:
        yield made
    finally:
        made.close()


async def everything(
    made: Batcher, prompts: list[list[int]], sampling: list[Sampling]
) -> list[Generated]:
    return await asyncio.wait_for(
        asyncio.gather(
            *(
                made.generate(p, s, seed)
                for seed, (p, s) in enumerate(zip(prompts, sampling, strict=True))
            )
        ),
        DEADLINE,
    )


def stand_still(model: Any, until: Callable[[], bool]) -> None:
    """After a few forwards, until something is so: whoever is slow finds it at work."""
    forwards = counting()

    def wait(*_: Any) -> None:
        while next(forwards) > 9 and not until():
            time.sleep(0.001)

    model.register_forward_pre_hook(wait)


def generate(model: Any, prompt: list[int], tokens: int, eos: int = 1, **more: Any) -> list[int]:
    """transformers' own greedy answer, the end token included."""
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False, max_new_tokens=tokens, eos_token_id=eos, pad_token_id=0, **more,
    )  # fmt: skip
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


def ragged(vocabulary: int, lengths: list[int]) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(2, vocabulary) for _ in range(length)] for length in lengths]


def test_greedy_is_generate_for_ragged_prompts(random_target: Target) -> None:
    prompts = ragged(64, [1, 40, 7, 3, 90, 12, 33, 5, 64, 2, 17, 16])
    lengths = [30, 5, 60, 1, 20, 44, 9, 2, 31, 50, 12, 28]
    # A token that the third answer says after a while ends all answers.
    eos = generate(random_target.model, prompts[2], 25)[-1]
    with batcher(random_target.model, eos={eos}) as made:
        answers = asyncio.run(everything(made, prompts, [Sampling(max_tokens=n) for n in lengths]))
    for prompt, most, answer in zip(prompts, lengths, answers, strict=True):
        assert answer.ids == generate(random_target.model, prompt, most, eos)
        assert answer.finish_reason == ("stop" if answer.ids[-1] == eos else "length")
    assert {a.finish_reason for a in answers} == {"stop", "length"}


def test_a_repetition_penalty_is_that_of_generate(random_target: Target) -> None:
    """Over prompt and answer, for its own row alone."""
    prompts = ragged(64, [12, 30, 7])
    penalties = [1.0, 1.7, 1.2]
    asked = [Sampling(max_tokens=20, repetition_penalty=penalty) for penalty in penalties]
    with batcher(random_target.model) as made:
        answers = asyncio.run(everything(made, prompts, asked))
    for prompt, penalty, answer in zip(prompts, penalties, answers, strict=True):
        expected = generate(random_target.model, prompt, 20, repetition_penalty=penalty)
        assert answer.ids == expected


def test_long_prompts_in_chunks(tiny_target: Target) -> None:
    prompts = ragged(1000, [1300, 513, 30])
    with batcher(tiny_target.model, eos={2}, cache=1 << 24) as made:
        greedy = [Sampling(max_tokens=8)] * 3
        answers = asyncio.run(everything(made, prompts, greedy))
        again = asyncio.run(everything(made, prompts, greedy))
    assert [a.ids for a in answers] == [generate(tiny_target.model, p, 8, 2) for p in prompts]
    assert [a.ids for a in again] == [a.ids for a in answers]
    assert [a.cached_tokens for a in again] == [1296, 512, 16]


@pytest.mark.parametrize("windowed_from", [0, 4])
def test_sliding_windows(windowed_from: int) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=8, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.3, use_sliding_window=True, sliding_window=6,
        max_window_layers=windowed_from,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    prompts = ragged(64, [30, 3, 11])
    with batcher(model) as made:
        answers = asyncio.run(everything(made, prompts, [Sampling(max_tokens=20)] * 3))
    assert [a.ids for a in answers] == [generate(model, p, 20) for p in prompts]


def test_other_memories_are_refused(random_target: Target) -> None:
    random_target.model.config.layer_types[3] = "linear_attention"
    with pytest.raises(InputError, match="linear_attention"):
        Slots(random_target.model, 2, 64)


def test_short_memory_means_fewer_at_a_time(
    random_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokens, count, room in ((10 * 512, 9, 512), (100, 1, 64)):
        size = 8 * 2 * 2 * 8 * 4 * tokens
        monkeypatch.setattr("specforge_exp.generation.local.slots.free_bytes", lambda _, s=size: s)
        slots = Slots(random_target.model, 16, 512)
        assert (slots.count, slots.room) == (count, room)


def test_a_sample_is_its_own(random_target: Target) -> None:
    prompts = ragged(64, [9, 30, 4, 17, 22, 9])
    kinds = [
        Sampling(0.9, 1, 9, max_tokens=25), Sampling(max_tokens=30), Sampling(2.0, max_tokens=40),
        Sampling(1.0, 0.8, max_tokens=18), Sampling(1.0, 0.9, 12, 0.05, max_tokens=33),
        Sampling(1.3, min_p=0.1, max_tokens=5),
    ]  # fmt: skip
    with batcher(random_target.model, slots=6) as made:
        together = asyncio.run(everything(made, prompts, kinds))
    with batcher(random_target.model, slots=1, cache=1 << 20) as made:
        for seed in (5, 4, 3, 2, 1, 0):
            alone = asyncio.run(made.generate(prompts[seed], kinds[seed], seed))
            assert alone.ids == together[seed].ids
        other = asyncio.run(made.generate(prompts[2], kinds[2], 99))
        assert other.ids != together[2].ids


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), 6), (Sampling(0.5), 6), (Sampling(1.0, top_k=3), 3),
        (Sampling(1.0, 0.75), 3), (Sampling(1.0, min_p=0.3), 3), (Sampling(2.0, 0.5, 5, 0.9), 1),
        (Sampling(1.0, 0.8, 4, 0.2), 3),
    ],
)  # fmt: skip
def test_samples_follow_the_filtered_distribution(sampling: Sampling, kept: int) -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.15, 0.05])
    rows, numbers = 6000, random.Random(3)
    # A row of another kind in between: rows are chosen in groups.
    samplings = [Sampling(), *[sampling] * rows]
    logits = probabilities.log().expand(rows + 1, -1)
    tokens = choose(logits, samplings, [numbers.random() for _ in range(rows + 1)])
    assert tokens[0] == 1
    counts = Counter(tokens[1:])
    weights = probabilities ** (1 / sampling.temperature)
    likeliest = weights.argsort(descending=True, stable=True)[:kept]
    assert set(counts) <= set(likeliest.tolist())
    expected = weights[likeliest] / weights[likeliest].sum() * rows
    if kept > 1:
        observed = [counts[token] for token in likeliest.tolist()]
        assert chisquare(observed, expected.double() * rows / expected.double().sum()).pvalue > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 3.0, 2.0, -torch.inf]])
    for sampling in (Sampling(1.0), Sampling(1.0, 0.999), Sampling(1.0, top_k=3), Sampling(1e-9)):
        assert choose(logits, [sampling], [uniform])[0] in (1, 2)


def test_prefixes_are_computed_once(random_target: Target) -> None:
    shared = ragged(64, [70])[0]
    prompts = [[*shared, t, t] for t in range(2, 8)] + [shared[:40]]
    greedy = [Sampling(max_tokens=20, ignore_eos=True)] * 7
    with batcher(random_target.model, slots=7, cache=1 << 20) as made:
        first = asyncio.run(everything(made, prompts, greedy))
        assert sorted(a.cached_tokens for a in first) == [0, 32, *[64] * 5]
        turn = [*shared, 2, 2, *first[0].ids, 3, 4, 5]
        second = asyncio.run(made.generate(turn, greedy[0], 0))
        # 72 of the prompt and 19 of the answer have been fed: the last token never was.
        assert second.cached_tokens == 80
        counted = dict(made.counts)
    assert counted["prompt_tokens"] - counted["cached_tokens"] == 72 + 5 * 8 + 8 + 15
    with batcher(random_target.model, slots=7) as made:
        assert [a.ids for a in asyncio.run(everything(made, prompts, greedy))] == [
            a.ids for a in first
        ]
        plain = asyncio.run(made.generate(turn, greedy[0], 0))
        assert (plain.ids, plain.cached_tokens) == (second.ids, 0)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), max_size=3), st.integers(0, BLOCK - 1)), max_size=12
    ),
    st.integers(0, 5),
)
def test_the_pool_gives_back_what_it_was_given(
    sequences: list[tuple[list[int], int]], size: int
) -> None:
    slots = Slots(small_target().model, 2, 512)
    prefixes = Prefixes(slots, size * BLOCK * slots.token_bytes)
    slots.reserve(4 * BLOCK)
    for kinds, rest in sequences:
        ids = [kind for kind in kinds for _ in range(BLOCK)] + [0] * rest
        marks = [float(hash(tuple(ids[: at + 1])) % 1000) for at in range(len(ids))]
        for store in slots.stores:
            store[0, :, : len(ids)] = torch.tensor(marks)[:, None]
        prefixes.keep(0, ids)
        kept = min(len(ids) // BLOCK, size)
        places, missing = prefixes.match([*ids, 0])
        assert len(places) == kept <= prefixes.size == size
        assert (missing is None) == (kept == len(ids) // BLOCK or size == 0)
        if places:
            prefixes.load(1, places)
            for store in slots.stores:
                assert torch.equal(store[1, :, : kept * BLOCK], store[0, :, : kept * BLOCK])
    assert len(prefixes.places) <= size
    assert len(set(prefixes.places.values())) == len(prefixes.places)
    assert all(parent == -1 or parent in prefixes.places.values() for parent, _ in prefixes.places)


def test_the_least_recently_used_prefix_goes_first(random_target: Target) -> None:
    slots = Slots(random_target.model, 1, 512)
    prefixes = Prefixes(slots, 4 * BLOCK * slots.token_bytes)
    slots.reserve(64)
    first, second, third = ([token] * 2 * BLOCK for token in (3, 4, 5))
    prefixes.keep(0, first)
    prefixes.keep(0, second)
    assert len(prefixes.match([*first, 0])[0]) == 2
    prefixes.keep(0, third)
    assert [len(prefixes.match([*ids, 0])[0]) for ids in (first, second, third)] == [2, 0, 2]


def test_cancelling_frees_the_slot(random_target: Target) -> None:
    endless = Sampling(max_tokens=500, ignore_eos=True)
    cancelled = Event()
    stand_still(random_target.model, cancelled.is_set)

    async def scene(made: Batcher) -> None:
        tasks = [asyncio.create_task(made.generate([5, 6], endless, 0)) for _ in range(3)]
        while not made.running:
            await asyncio.sleep(0)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.wait(tasks[:2])
        cancelled.set()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), DEADLINE)
        assert isinstance(done[0], asyncio.CancelledError)
        assert isinstance(done[2], Generated)
        assert len(done[2].ids) == 500

    with batcher(random_target.model, slots=1) as made:
        asyncio.run(scene(made))
        assert made.counts["generated_tokens"] < 1000


def test_a_failing_forward_fails_its_rows_only(random_target: Target) -> None:
    with batcher(random_target.model, cache=1 << 20) as made:
        # 64 is outside the vocabulary.
        with pytest.raises(Failed, match="IndexError"):
            asyncio.run(made.generate([5, 64], Sampling(), 0))
        answer = asyncio.run(made.generate([5, 6], Sampling(max_tokens=9), 0))
        assert answer.ids == generate(random_target.model, [5, 6], 9)


def test_what_is_under_way_fails_at_close(random_target: Target) -> None:
    async def scene(made: Batcher) -> list[Any]:
        tasks = [asyncio.create_task(made.generate([5], Sampling(max_tokens=500), 0))] * 2
        while not made.running:
            await asyncio.sleep(0)
        await asyncio.to_thread(made.close)
        tasks.append(asyncio.create_task(made.generate([5], Sampling(), 0)))
        return await asyncio.gather(*tasks, return_exceptions=True)

    with batcher(random_target.model, slots=1, eos=set()) as made:
        stand_still(random_target.model, lambda: made.closing)
        assert all(isinstance(r, Failed) for r in asyncio.run(scene(made)))


def test_a_sequence_ends_where_the_context_does(random_target: Target) -> None:
    with batcher(random_target.model, eos=set()) as made:
        answer = asyncio.run(made.generate([3] * 500, Sampling(), 0))
        assert (len(answer.ids), answer.finish_reason) == (12, "length")
        with pytest.raises(Refused, match="512 tokens; the context of 512"):
            asyncio.run(made.generate([3] * 512, Sampling(), 0))
        made.slots.room = 100
        with pytest.raises(Refused, match="may take 130 tokens and memory holds 100"):
            asyncio.run(made.generate([3] * 30, Sampling(max_tokens=100), 0))


def test_the_engine_renders_and_decodes(
    cfg: Config, tiny_target: Target, tiny_tokenizer: Any
) -> None:
    messages = [{"role": "user", "content": "How many apples has Otto?"}]
    engine = engine_over(cfg, tiny_target, tiny_tokenizer, cache_mb=1)

    async def scene() -> None:
        answer = await engine.answer(Request(messages, Sampling(max_tokens=300)))
        ids = prompt_ids(tiny_tokenizer, messages, {})
        said = generate(tiny_target.model, ids, 300, 2)
        assert said[-1] == 2
        assert answer.message == {"role": "assistant", "content": tiny_tokenizer.decode(said[:-1])}
        assert (answer.finish_reason, answer.prompt_tokens) == ("stop", len(ids))
        assert answer.completion_tokens == len(said)
        long = [{"role": "user", "content": "apples " * 3000}]
        with pytest.raises(Refused, match="the context of 2048"):
            await engine.answer(Request(long, Sampling()))
        with pytest.raises(Unrenderable, match="chat template"):
            await engine.answer(Request([{"role": "user"}], Sampling()))
        await engine.close()

    asyncio.run(scene())


CALLS = (
    "{% for m in messages %}{% if m.tool_calls %}x is {{ m.tool_calls[0].function.arguments.x }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_arguments_of_tool_calls_are_read_as_servers_read_them(
    cfg: Config, tiny_target: Target
) -> None:
    """OpenAI's are JSON in a string; templates want the object."""
    tokenizer = load_tokenizer(cfg.model)
    tokenizer.chat_template = CALLS
    engine = engine_over(cfg, tiny_target, tokenizer, cache_mb=1)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    request = Request([{"role": "user", "content": "now "}, said], Sampling(max_tokens=1))
    broken = {**call, "function": {"name": "f", "arguments": "{"}}

    async def both() -> int:
        answer = await engine.answer(request)
        with pytest.raises(Unrenderable, match="arguments are no JSON"):
            await engine.answer(replace(request, messages=[{**said, "tool_calls": [broken]}]))
        await engine.close()
        return answer.prompt_tokens

    assert asyncio.run(both()) == len(tokenizer("now x is 7")["input_ids"])
