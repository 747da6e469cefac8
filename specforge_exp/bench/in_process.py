"""Answers by this process, one at a time: with the draft and by the target alone in turn."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from specforge_exp import paths
from specforge_exp.bench.acceptance import PairedAnswer, overlap
from specforge_exp.bench.asking import Asking, SetAnswers, Talk
from specforge_exp.bench.speculative import generate, speculate
from specforge_exp.config import Config, locate
from specforge_exp.data.chat import Message
from specforge_exp.target import (
    Target,
    check_decoding,
    check_length,
    load_target,
    load_tokenizer,
    set_up_torch,
    take_dtype,
)


class Pair(NamedTuple):
    """A target and its draft, if it has one."""

    target: Target
    draft: Any


def answer(cfg: Config, asking: Asking, sets: dict[str, list[Talk]]) -> dict[str, SetAnswers]:
    """As `asking.BenchEngine`."""
    pair = load_pair(cfg, paths.export_dir(cfg), cfg.bench.dtype, cfg.bench.max_length)
    return {name: answer_all(name, asks, asking, pair) for name, asks in sets.items()}


def load_pair(cfg: Config, folder: Path | None, dtype: str, most: int | None = None) -> Pair:
    """Load a target and its draft.

    Args:
        cfg: which.
        folder: where the draft was exported to; None: no draft.
        dtype: of the target.
        most: bench.max_length; None: max_length counts.

    Raises:
        InputError: they cannot be loaded, or do not fit each other.
    """
    device = set_up_torch(cfg)
    kind = locate(cfg.draft._target_)
    feeds = partial(kind.target_layers, cfg.draft) if folder else None
    check_length(cfg.model, most or cfg.max_length, "bench.max_length" if most else "max_length")
    target = load_target(cfg.model, device, dtype, feeds=feeds)
    target.tokens = max(load_tokenizer(cfg.model).get_vocab().values()) + 1
    check_decoding(target)
    if folder is None:
        return Pair(target, None)
    draft = kind.load(folder, target).to(device)
    take_dtype(draft, target.model.dtype)
    return Pair(target, draft)


def answer_all(name: str, conversations: list[Talk], asking: Asking, pair: Pair) -> SetAnswers:
    """Answer each conversation's turns; the very first prompt once more before, to warm up."""
    generator = torch.Generator().manual_seed(asking.seed)
    answers = [
        converse(talk, asking, pair, generator)
        for talk in tqdm(
            [conversations[0]._replace(asks=conversations[0].asks[:1]), *conversations],
            desc=f"bench {name}",
            unit="prompt",
            disable=None,
        )
    ]
    requests = [request for requests in answers[1:] for request in requests]
    seconds = sum(r.with_draft.seconds for r in requests)
    return SetAnswers(requests, seconds, sum(r.alone.seconds for r in requests if r.alone))


def converse(
    talk: Talk, asking: Asking, pair: Pair, generator: torch.Generator
) -> list[PairedAnswer]:
    """Ask in turn, with the draft and alone, each time after the drafted answer to the one before.

    Ends before a turn for which there is no room.
    """
    requests: list[PairedAnswer] = []
    messages: list[Message] = []
    target, draft, decoding = pair.target, pair.draft, asking.decoding
    for ask in talk.asks:
        prompt = asking.encode(messages := [*messages, *ask], talk.tools)
        if not 0 < len(prompt) <= asking.room:
            break
        drafted = speculate(target, draft.decoder(), draft.draft_ids_D, prompt, decoding, generator)
        alone = generate(target, prompt, decoding, generator)
        novelty = overlap(alone.tokens, asking.training_keys)
        requests.append(PairedAnswer(drafted, alone, novelty, follows=bool(requests)))
        messages.append({"role": "assistant", "content": asking.decode(drafted.tokens)})
    return requests
