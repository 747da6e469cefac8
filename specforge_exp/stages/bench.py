"""bench: what an exported draft earns.

Reads checkpoints/<run_name>/export/ and the target; writes checkpoints/<run_name>/bench.json, or
bench-<suite>.json.
Every prompt is answered twice in turn, with the draft and by the target alone.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from specforge_exp import paths
from specforge_exp.artifacts import Fingerprint, disk_errors, read_record, require, reusable
from specforge_exp.bench.acceptance import Request, overlap, summarise, training_ngrams
from specforge_exp.bench.published import same_setting
from specforge_exp.bench.sets import bench_sets
from specforge_exp.bench.table import table
from specforge_exp.chat import Message, eos_token_ids, prompt_ids
from specforge_exp.config import Config, locate
from specforge_exp.conversations import asks_of
from specforge_exp.errors import InputError
from specforge_exp.provenance import describe, model_digest, sha256, write_json
from specforge_exp.speculative import Decoding, generate, speculate
from specforge_exp.target import (
    DTYPES,
    Target,
    check_gpus,
    load_target,
    load_tokenizer,
    set_up_torch,
)
from specforge_exp.tokens import read_split

log = logging.getLogger(__name__)


def bench(cfg: Config) -> float:
    """Measure the accepted length; returns its average over the data sets."""
    check_gpus(cfg, "bench")
    file, folder = paths.bench_file(cfg), paths.export_dir(cfg)
    command = f"python export.py run_name={cfg.run_name} (with the same options)"
    inputs = {
        "the export": sha256(require(folder / "run.json", command)),
        "the target": model_digest(cfg.model.path),
    }
    options = asdict(cfg.bench)
    del options["force"]
    options["chain_length"] = cfg.chain_length
    settings = {**options, "seed": cfg.seed, "max_length": cfg.max_length}
    fingerprint = Fingerprint(inputs, settings)
    if reusable(file, fingerprint, cfg.bench.force, "bench"):
        result = read_record(file)
    else:
        result = describe(cfg, inputs, settings) | measure(cfg)
        with disk_errors(file):
            write_json(file, result)
    print(table(result, same_setting(result)))
    return float(result["average"])


@dataclass(frozen=True)
class Bench:
    """What answers prompts, with a draft and without."""

    target: Target
    draft: Any
    decoding: Decoding
    known: torch.Tensor | None
    """Keys of the training answers' 8-grams; None: not known."""
    encode: Callable[[list[Message]], list[int]]
    """The prompt of a conversation so far."""
    decode: Callable[[list[int]], str]
    """The text of an answer."""
    room: int
    """Tokens of a prompt, at most."""


def measure(cfg: Config) -> dict[str, Any]:
    """Answer all prompts and summarise; the parts of bench.json that are results."""
    own = cfg.bench
    sets = bench_sets(cfg)
    setup = set_up(cfg)
    found: dict[str, Any] = {}
    left_out: Counter[str] = Counter()
    limit = f"max_length={setup.room + own.max_tokens} with bench.max_tokens={own.max_tokens}"
    for name, records in sets.records.items():
        asks = [asks_of(record)[: 1 if own.turns == "first" else None] for record in records]
        lengths = [len(setup.encode(ask[0])) for ask in asks]
        long = [number for number, length in enumerate(lengths) if length > setup.room]
        if long and not own.suite:
            raise InputError(
                f"bench data set {name}: the prompt {records[long[0]]['id']} has "
                f"{lengths[long[0]]} tokens, too many for {limit}"
            )
        left_out[name] += len(long)
        asks = [ask for ask, length in zip(asks, lengths, strict=True) if length <= setup.room]
        if not asks:
            continue
        requests = answer_all(name, asks, setup)
        found[name] = {"source": sets.origins[name]} | summarise(
            requests, cfg.chain_length, own.bootstrap, own.temperature == 0, own.average
        )
        left_out[f"{name} (later turns)"] += sum(map(len, asks)) - len(requests)
    if not found:
        raise InputError(f"bench: no prompt fits {limit}")
    average = sum(d["accepted_length"] for d in found.values()) / len(found)
    return {
        "target": cfg.model.path, "draft": str(paths.export_dir(cfg)), "datasets": found,
        "left_out": dict(+left_out), "samples_because": sets.why, "average": average,
    }  # fmt: skip


def set_up(cfg: Config) -> Bench:
    """Load target and draft."""
    device = set_up_torch(cfg)
    tokenizer = load_tokenizer(cfg.model)
    kind = locate(cfg.draft._target_)
    feeds = partial(kind.target_layers, cfg.draft)
    target = load_target(cfg.model, device, cfg.bench.dtype, feeds=feeds)
    kwargs = dict(cfg.model.chat_template_kwargs)
    if cfg.bench.thinking != "model":
        kwargs["enable_thinking"] = cfg.bench.thinking == "on"
    return Bench(
        target,
        kind.load(paths.export_dir(cfg), target).to(device, DTYPES[cfg.bench.dtype]),
        Decoding(
            max_tokens=cfg.bench.max_tokens,
            chain_length=cfg.chain_length,
            temperature=cfg.bench.temperature,
            eos=frozenset(eos_token_ids(cfg.model.path, tokenizer)),
        ),
        training_answers(cfg),
        lambda messages: prompt_ids(tokenizer, messages, kwargs),
        partial(tokenizer.decode, skip_special_tokens=True),
        (cfg.bench.max_length or cfg.max_length) - cfg.bench.max_tokens,
    )


def training_answers(cfg: Config) -> torch.Tensor | None:
    """Keys of the training answers' 8-grams; None where the token shards are not at hand."""
    folder = paths.tokens_dir(cfg)
    if not (folder / "index.json").exists():
        log.info("bench: %s is not here, so answers are not compared with training ones", folder)
        return None
    train = read_split(folder, "train")
    return training_ngrams(train.ids, train.turns)


def answer_all(name: str, conversations: list[list[list[Message]]], setup: Bench) -> list[Request]:
    """Answer each conversation's turns; the very first prompt once more before, to warm up."""
    generator = torch.Generator().manual_seed(0)
    answers = [
        converse(asks, setup, generator)
        for asks in tqdm(
            [conversations[0][:1], *conversations],
            desc=f"bench {name}",
            unit="prompt",
            disable=None,
        )
    ]
    return [request for requests in answers[1:] for request in requests]


def converse(asks: list[list[Message]], setup: Bench, generator: torch.Generator) -> list[Request]:
    """Ask in turn, with the draft and alone, each time after the drafted answer to the one before.

    Ends before a turn for which there is no room.
    """
    requests: list[Request] = []
    messages: list[Message] = []
    target, draft, decoding = setup.target, setup.draft, setup.decoding
    for ask in asks:
        prompt = setup.encode(messages := [*messages, *ask])
        if len(prompt) > setup.room:
            break
        drafted = speculate(target, draft.decoder(), draft.draft_ids_D, prompt, decoding, generator)
        alone = generate(target, prompt, decoding, generator)
        novelty = overlap(alone.tokens, setup.known)
        requests.append(Request(drafted, alone, novelty, follows=bool(requests)))
        messages.append({"role": "assistant", "content": setup.decode(drafted.tokens)})
    return requests
