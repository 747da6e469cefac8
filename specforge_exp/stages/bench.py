"""bench: what an exported draft earns.

Reads checkpoints/<run_name>/export/ and the target; writes checkpoints/<run_name>/bench.json.
Every prompt is answered twice in turn, with the draft and by the target alone.
"""

import logging
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from specforge_exp import paths
from specforge_exp.acceptance import Request, overlap, summarise, training_ngrams
from specforge_exp.artifacts import Fingerprint, disk_errors, read_record, require, reusable
from specforge_exp.chat import eos_token_ids, prompt_ids
from specforge_exp.config import Config, locate
from specforge_exp.conversations import prompt_of, read_jsonl
from specforge_exp.errors import InputError
from specforge_exp.provenance import describe, model_digest, sha256, write_json
from specforge_exp.sources import load
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
    print(table(result))
    return float(result["average"])


def measure(cfg: Config) -> dict[str, Any]:
    """Answer all prompts and summarise; the parts of bench.json that are results."""
    device = set_up_torch(cfg)
    tokenizer = load_tokenizer(cfg.model)
    kind = locate(cfg.draft._target_)
    feeds = partial(kind.target_layers, cfg.draft)
    target = load_target(cfg.model, device, cfg.bench.dtype, feeds=feeds)
    draft = kind.load(paths.export_dir(cfg), target).to(device, DTYPES[cfg.bench.dtype])
    known = training_answers(cfg)
    decoding = Decoding(
        max_tokens=cfg.bench.max_tokens,
        chain_length=cfg.chain_length,
        temperature=cfg.bench.temperature,
        eos=frozenset(eos_token_ids(cfg.model.path, tokenizer)),
    )
    found = {}
    for name, conversations in data_sets(cfg).items():
        prompts = []
        for record in conversations:
            ids = prompt_ids(tokenizer, prompt_of(record), cfg.model.chat_template_kwargs)
            if len(ids) + cfg.bench.max_tokens > cfg.max_length:
                raise InputError(
                    f"bench data set {name}: the prompt {record['id']} has {len(ids)} tokens; with "
                    f"bench.max_tokens={cfg.bench.max_tokens} it exceeds "
                    f"max_length={cfg.max_length}"
                )
            prompts.append(ids)
        requests = answer_all(name, prompts, target, draft, decoding, known)
        greedy = cfg.bench.temperature == 0
        found[name] = summarise(requests, cfg.chain_length, cfg.bench.bootstrap, greedy)
    average = sum(d["accepted_length"] for d in found.values()) / len(found)
    run = paths.export_dir(cfg)
    return {"target": cfg.model.path, "draft": str(run), "datasets": found, "average": average}


def training_answers(cfg: Config) -> torch.Tensor | None:
    """Keys of the training answers' 8-grams; None where the token shards are not at hand."""
    folder = paths.tokens_dir(cfg)
    if not (folder / "index.json").exists():
        log.info("bench: %s is not here, so answers are not compared with training ones", folder)
        return None
    train = read_split(folder, "train")
    return training_ngrams(train.ids, train.turns)


def data_sets(cfg: Config) -> dict[str, list[dict[str, Any]]]:
    """The conversations of every data set; without any named, the run's held-out ones."""
    if cfg.bench.datasets:
        return {name: load(source, name) for name, source in cfg.bench.datasets.items()}
    path = require(paths.prompts_dir(cfg) / "eval.jsonl", f"python prep.py data={cfg.data.name}")
    return {"held-out": list(read_jsonl(path))}


def answer_all(
    name: str,
    prompts: list[list[int]],
    target: Target,
    draft: Any,
    decoding: Decoding,
    known: torch.Tensor | None,
) -> list[Request]:
    """Answer each prompt with the draft and alone; the first once more before, to warm up."""
    requests = []
    generator = torch.Generator().manual_seed(0)
    bar = tqdm([prompts[0], *prompts], desc=f"bench {name}", unit="prompt", disable=None)
    for prompt in bar:
        drafted = speculate(target, draft.decoder(), draft.draft_ids_D, prompt, decoding, generator)
        alone = generate(target, prompt, decoding, generator)
        requests.append(Request(drafted, alone, overlap(alone.tokens, known)))
    return requests[1:]


def table(result: dict[str, Any]) -> str:
    """bench.json as a table for people."""
    settings = result["settings"]
    chain, temperature = settings["chain_length"], settings["temperature"]
    head = f"{'data set':14} {'prompts':>7} {'tau':>6} {'95 % interval':>15} {'pooled':>7}"
    head += f" {'novel':>11} {'speed-up':>8} {'forwards saved':>14}  lossless"
    lines = [f"{result['draft']}: chain of {chain}, temperature {temperature}", head]
    for name, d in result["datasets"].items():
        low, high = d["accepted_length_ci95"] or (1.0, 1.0)
        novel = d["novel"]
        fresh = (
            "-" if not novel["prompts"] else f"{novel['accepted_length']:.2f} ({novel['prompts']})"
        )
        lossless = {True: "yes", False: "NO", None: "sampled"}[d["lossless"]]
        lines.append(
            f"{name:14} {d['prompts']:7} {d['accepted_length']:6.2f} {low:7.2f}-{high:<7.2f} "
            f"{d['accepted_length_pooled']:7.2f} {fresh:>11} {d['speedup']:7.2f}x "
            f"{100 * d['target_forwards_saved']:13.0f}%  {lossless}"
        )
    lines.append(f"average tau {result['average']:.2f}")
    rates = [
        f"{name} {' '.join(f'{rate:.2f}' for rate in d['acceptance_by_position'])}"
        for name, d in result["datasets"].items()
    ]
    lines.append("accepted at position 1.. : " + " | ".join(rates))
    return "\n".join(lines)
