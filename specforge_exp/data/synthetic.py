"""A deterministic, templated instruction corpus that needs no download and no licence.

Every category is a grammar of synthetic.json: tables of slot values whose product enumerates all
prompts, prompt patterns, an answer pattern, and a follow-up question with its reply. A table's key
names its columns, a row has its cells between " / ". Patterns use two marks: ``<a|b|c>`` is one of
the alternatives (``<adj>`` one of that pool of words) and ``{slot}`` a slot value, which may itself
name slots. Earlier alternatives are likelier than later ones, so that the text has a clear mode
at every fork and yet a real entropy.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

SPLITS = ("train", "eval", "bench")
CATEGORIES = ("stories", "arithmetic", "howto", "objects", "python")
SECOND_TURN_SHARE = 0.3
SLOT = re.compile(r"\{(\w+)\}")
CHOICE = re.compile(r"<([^<>]*)>")


@cache
def tables() -> dict[str, Any]:
    """The content of synthetic.json: pools of words and grammars."""
    content: dict[str, Any] = json.loads(files(__package__).joinpath("synthetic.json").read_text())
    return content


def pick(options: Sequence[str], rng: random.Random) -> str:
    """One of the options, the earlier ones likelier.

    random() alone is promised to stay the same across Python versions.
    """
    return options[int(len(options) * rng.random() ** 2)]


def seeded(*parts: object) -> random.Random:
    """A generator that the parts decide."""
    return random.Random("\n".join(map(str, parts)))


def fill(pattern: str, slots: dict[str, str], rng: random.Random) -> str:
    """A pattern as text; alternatives first, as slot values may hold a bare ">"."""
    pools = tables()["pools"]

    def choose(match: re.Match[str]) -> str:
        mark = match[1]
        return pick(pools[mark].split() if mark in pools else mark.split("|"), rng)

    text = CHOICE.sub(choose, pattern)
    while SLOT.search(text):
        text = SLOT.sub(lambda match: slots[match[1]], text)
    return text


def split_of(prompt: str) -> str:
    """The one split that a first user text belongs to: about 80/10/10 of all texts."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 10
    return "train" if bucket < 8 else SPLITS[bucket - 7]


@cache
def prompts_of(category: str) -> dict[str, dict[str, str]]:
    """Every distinct prompt of the category, with its slot values."""
    grammar = tables()["grammars"][category]
    names = [name for columns in grammar["tables"] for name in columns.split()]
    patterns = grammar["prompts"]
    prompts: dict[str, dict[str, str]] = {}
    for rows in itertools.product(*grammar["tables"].values()):
        cells = [cell for row in rows for cell in row.split(" / ")]
        slots = dict(zip(names, cells, strict=True))
        if "a" in slots:  # arithmetic, whose answers need the results of its sums
            a, b = int(slots["a"]), int(slots["b"])
            sums = {"sum": a + b, "diff": a - b, "prod": a * b, "net": a + b - 1}
            slots |= {name: str(value) for name, value in sums.items()}
        rng = seeded(category, *slots.values())
        # Uniform here: the prompts are given, so their entropy costs the model nothing.
        pattern = patterns[int(len(patterns) * rng.random())]
        prompts.setdefault(fill(pattern, slots, rng), slots)
    return prompts


def ranked(split: str, category: str, seed: int) -> list[str]:
    """The prompts of a split, in the order that the seed gives them."""
    pool = [prompt for prompt in prompts_of(category) if split_of(prompt) == split]
    return sorted(pool, key=lambda prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest())


def conversation(category: str, prompt: str, seed: int) -> dict[str, Any]:
    """The prompt with an answer, and often a question about it with its reply."""
    grammar, slots = tables()["grammars"][category], prompts_of(category)[prompt]
    rng = seeded(seed, prompt)
    turns = [(prompt, grammar["answer"])]
    if rng.random() < SECOND_TURN_SHARE:
        turns.append((grammar["question"], grammar["reply"]))
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": fill(question, slots, rng)})
        messages.append({"role": "assistant", "content": fill("".join(answer), slots, rng)})
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
    return {"id": f"synthetic-{category}-{digest}", "category": category, "conversations": messages}


def generate(
    split: str, count: int, seed: int = 0, category: str | None = None
) -> list[dict[str, Any]]:
    """Return `count` conversations of a split, with distinct first user texts.

    A conversation is ``{"id", "category", "conversations"}``, the last a list of one or two
    user/assistant pairs of ``{"role", "content"}``. The id follows from the first user text, and
    so does the split, so no text is in two splits, whatever the seeds. The seed decides the order
    and the wording of the answers; a smaller count gives a prefix of a larger one. Without a
    category the categories take turns until each is used up.

    Raises:
        ValueError: unknown split or category, a negative count, or more than there are.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}: expected one of {', '.join(CATEGORIES)}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    chosen = CATEGORIES if category is None else (category,)
    columns = [[(name, prompt) for prompt in ranked(split, name, seed)] for name in chosen]
    pairs = [pair for row in itertools.zip_longest(*columns) for pair in row if pair is not None]
    if count > len(pairs):
        where = "" if category is None else f" in category {category}"
        raise ValueError(f"asked for {count}, but {split}{where} has {len(pairs)} conversations")
    return [conversation(name, prompt, seed) for name, prompt in pairs[:count]]
