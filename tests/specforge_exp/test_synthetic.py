"""The synthetic corpus and the tiny target trained on it."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from specforge_exp.data import synthetic

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny_target"

splits = st.sampled_from(synthetic.SPLITS)
categories = st.sampled_from([None, *synthetic.CATEGORIES])
seeds = st.integers(min_value=0, max_value=10**6)
counts = st.integers(min_value=0, max_value=200)


def first_texts(conversations: list[dict]) -> list[str]:
    return [conversation["conversations"][0]["content"] for conversation in conversations]


@cache
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


def available(split: str, category: str | None = None) -> int:
    with pytest.raises(ValueError, match=r"has \d+ conversations") as caught:
        synthetic.generate(split, 10**9, category=category)
    return int(str(caught.value).split()[-2])


@settings(max_examples=15, deadline=None)
@given(splits, splits, categories, seeds, seeds)
def test_no_prompt_is_in_two_splits(
    one: str, other: str, category: str | None, seed: int, other_seed: int
) -> None:
    mine = set(first_texts(synthetic.generate(one, 200, seed, category)))
    theirs = set(first_texts(synthetic.generate(other, 200, other_seed, category)))
    assert one == other or not mine & theirs


@settings(max_examples=15, deadline=None)
@given(splits, counts, seeds, categories)
def test_prompts_and_ids_are_distinct_and_of_the_split(
    split: str, count: int, seed: int, category: str | None
) -> None:
    conversations = synthetic.generate(split, count, seed, category)
    texts = first_texts(conversations)
    assert len(set(texts)) == len({c["id"] for c in conversations}) == count
    assert {synthetic.split_of(text) for text in texts} <= {split}


@settings(max_examples=15, deadline=None)
@given(splits, counts, counts, seeds, categories)
def test_a_smaller_count_gives_a_prefix(
    split: str, one: int, other: int, seed: int, category: str | None
) -> None:
    small, large = sorted((one, other))
    expected = synthetic.generate(split, large, seed, category)[:small]
    assert synthetic.generate(split, small, seed, category) == expected


def test_the_text_does_not_change_between_releases() -> None:
    first = synthetic.generate("bench", 1)[0]
    assert first["id"] == "synthetic-stories-369d3e3e8ef250f5"
    expected = (
        "Please write a tale set in the harbour, with a squirrel named Iris and a wooden flute."
    )
    assert first["conversations"][0]["content"] == expected


def test_the_seed_changes_order_and_wording() -> None:
    zero, one = (synthetic.generate("train", 50, seed) for seed in (0, 1))
    assert first_texts(zero) != first_texts(one)
    count = available("bench", "stories")
    answers = [
        {c["id"]: c["conversations"] for c in synthetic.generate("bench", count, seed, "stories")}
        for seed in (0, 1)
    ]
    assert answers[0].keys() == answers[1].keys()
    assert answers[0] != answers[1]


@pytest.mark.parametrize("category", synthetic.CATEGORIES)
def test_conversations_are_well_formed(category: str) -> None:
    conversations = synthetic.generate("eval", 300, category=category)
    lengths = set()
    for conversation in conversations:
        messages = conversation["conversations"]
        lengths.add(len(messages))
        assert conversation["category"] == category
        assert conversation["id"].startswith(f"synthetic-{category}-")
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert not any(mark in m["content"] for m in messages for mark in "{}|<")
        assert all(40 <= len(m["content"].split()) <= 120 for m in messages[1::2])
    assert lengths == {2, 4}


@pytest.mark.parametrize("split", synthetic.SPLITS)
def test_all_categories_take_part_and_all_prompts_can_be_had(split: str) -> None:
    total = available(split)
    assert total == sum(available(split, category) for category in synthetic.CATEGORIES)
    assert len(synthetic.generate(split, total)) == total
    conversations = synthetic.generate(split, 10)
    assert {c["category"] for c in conversations} == set(synthetic.CATEGORIES)


def test_there_are_enough_prompts() -> None:
    assert available("train") >= 16_000
    assert min(available("eval"), available("bench")) >= 2_000


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'test'.*train, eval, bench"):
        synthetic.generate("test", 1)
    with pytest.raises(ValueError, match=r"'poems'.*stories, arithmetic, howto, objects, python"):
        synthetic.generate("train", 1, category="poems")
    with pytest.raises(ValueError, match="negative"):
        synthetic.generate("train", -1)


def test_arithmetic_answers_are_right() -> None:
    for conversation in synthetic.generate("bench", 200, category="arithmetic"):
        answer = conversation["conversations"][1]["content"]
        term, result = re.search(r"(\d[\d +*-]+) = (\d+)", answer).groups()
        assert eval(term) == int(result)
        assert result in answer.split(". ")[-1]


def test_the_python_answers_compile_and_run() -> None:
    for conversation in synthetic.generate("bench", 200, category="python"):
        code = conversation["conversations"][1]["content"].split("```python\n")[1].split("```")[0]
        names: dict = {}
        exec(code, names)
        function = next(value for name, value in names.items() if name != "__builtins__")
        function([1, 5, 9, 12])
        function([])


def test_the_tiny_target_is_small() -> None:
    files = {path.name: path.stat().st_size for path in TINY.iterdir() if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(
        files
    )
    assert sum(files.values()) <= 4 * 2**20


def test_the_tiny_target_answers_and_stops() -> None:
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    assert model.config.num_hidden_layers == 8
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = tokenizer.apply_chat_template(
        synthetic.generate("bench", 1)[0]["conversations"][:1],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=256, do_sample=False)[0]
    answer = output[prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert len(tokenizer.decode(answer, skip_special_tokens=True).split()) >= 30


def test_the_chat_template_is_chatml() -> None:
    tokenizer = tiny_tokenizer()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_the_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
