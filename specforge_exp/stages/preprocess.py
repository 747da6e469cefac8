"""preprocess: conversations -> token ids, supervised turns and the draft's vocabulary.

Reads datasets/<data>--<model>/ (or datasets/<data>/ with preprocess.source=prep); writes
datasets/<data>--<model>.tokens/. Loss masks come from the target's own chat template; report.json
says what they look like, what was set aside and how much the draft's vocabulary covers; run.json
repeats what trains nothing (`left_out`), by split and reason, as does the last line.
"""

import logging
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from specforge_exp import paths
from specforge_exp.artifacts import (
    Fingerprint,
    changed_target,
    model_digest,
    read_record,
    reusable,
    sha256,
    writing,
)
from specforge_exp.config import Config
from specforge_exp.data.blocks import LineBlock, cut, encode_blocks, intact, make_chat, read_encoded
from specforge_exp.data.chat import Unrenderable, prompt_text
from specforge_exp.data.tokens import Ints, ShardWriter, packing
from specforge_exp.data.turns import end_of_answers
from specforge_exp.drafts.vocabulary import vocabulary_mapping, write_mapping
from specforge_exp.errors import InputError
from specforge_exp.inputs import require, unchanged
from specforge_exp.records import write_json
from specforge_exp.target import check_length, load_tokenizer, text_config
from specforge_exp.target.loading import fed_by
from specforge_exp.training.learnable import listed, nothing_to_learn, refuse_nothing

log = logging.getLogger(__name__)

OPTIONS = ("source", "overlong", "last_turn_only", "changed_turns", "thinking")
"""Options of this stage that change its result."""
UNUSED = ("read", "set_aside", "truncated", "answers_left_out", "nothing_to_learn")
"""Entries of report.json that say how much of a split trains nothing; run.json has them too."""
ENOUGH = 0.95
"""Coverage below this is worth a warning."""


@dataclass
class TokenSplit:
    """What one file became."""

    path: Path
    counts_V: Ints
    """How often each id is supervised."""
    account: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Sequences from which the draft learns nothing, by reason."""
    lengths: list[Ints] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)


def preprocess(cfg: Config) -> Path:
    """Write the token shards of this data set for this target; returns their folder."""
    folder = paths.tokens_dir(cfg)
    names = ("train", "eval")
    source = require(cfg, cfg.preprocess.source, *(f"{name}.jsonl" for name in names))
    files = {name: source / f"{name}.jsonl" for name in names}
    digests = {path: sha256(path) for path in files.values()}
    inputs = {f"{source.name}/{path.name}": digest for path, digest in digests.items()}
    inputs["the target"] = model_digest(cfg.model.path)
    settings = {
        **{f"preprocess.{key}": vars(cfg.preprocess)[key] for key in OPTIONS},
        "max_length": cfg.max_length,
        "draft.draft_vocab_size": cfg.draft.draft_vocab_size,
        "model.chat_template_kwargs": cfg.model.chat_template_kwargs,
    }
    if cfg.preprocess.source == "regen":
        settings["the end of a cut answer"] = "not supervised"
    fingerprint = Fingerprint(inputs, settings)
    if reusable(folder / "run.json", fingerprint, cfg.preprocess.force, "preprocess"):
        return folder
    too_long = check_length(cfg.model, cfg.max_length)
    try:
        fed_by(cfg)
    except InputError as error:
        log.warning("preprocess: warning: these tokens train no draft, only models: %s", error)
    vocabulary = text_config(cfg.model).vocab_size
    size = cfg.draft.vocabulary(vocabulary)
    counts: dict[str, Any] = {}
    with writing(folder, fingerprint, cfg, "preprocess", "blocks/*", counts) as partial:
        blocks = {name: cut(path) for name, path in files.items()}
        encode_files(cfg, [block for part in blocks.values() for block in part], partial / "blocks")
        splits = {
            name: merge(cfg, TokenSplit(files[name], np.zeros(vocabulary, np.int64)), part, partial)
            for name, part in blocks.items()
        }
        write_json(partial / "index.json", {name: split.shards for name, split in splits.items()})
        mapping = vocabulary_mapping(torch.from_numpy(splits["train"].counts_V), size)
        write_mapping(partial / "vocab_mapping.pt", mapping)
        row = cfg.trainer.pack_tokens or cfg.max_length
        limited = size < vocabulary and "draft_vocab_size" in cfg.draft.matters()
        in_draft_V = mapping["t2d"].numpy() | (not limited)
        report = {name: describe(split, in_draft_V, row) for name, split in splits.items()}
        counts["left_out"] = {n: {key: entry[key] for key in UNUSED} for n, entry in report.items()}
        end = end_of_answers(make_chat(cfg))
        warnings = [text for name in splits for text in doubts(name, report[name], end)]
        warnings += [too_long] if too_long else []
        warnings += others_answers(cfg, source) + unread(cfg)
        write_json(
            partial / "report.json", {"draft_vocab_size": size, **report, "warnings": warnings}
        )
        unchanged(digests)
    if limited:
        log.info(
            "preprocess: the draft's %d tokens cover %.2f %% of the answers, %.2f %% of the "
            "held-out", size, 100 * report["train"]["coverage"], 100 * report["eval"]["coverage"],
        )  # fmt: skip
    for text in warnings:
        log.warning("preprocess: warning: %s", text)
    log.info("preprocess: complete: %s%s", folder, left_out(report))
    return folder


def unread(cfg: Config) -> list[str]:
    """What is to be said about switches of which the chat template has never heard."""
    text, kwargs = str(load_tokenizer(cfg.model).chat_template), cfg.model.chat_template_kwargs
    return [
        f"model.chat_template_kwargs.{name} changes nothing: the chat template does not know it"
        for name in kwargs
        if name not in text
    ]


def others_answers(cfg: Config, source: Path) -> list[str]:
    """What is to be said about answers that another target of the same name has given, or to
    prompts that have changed since or are shown otherwise here."""
    record = source / "run.json"
    if cfg.preprocess.source != "regen" or not record.exists():
        return []
    made = read_record(record)
    remedy = "its answers teach the draft another model: regen.force=true answers again"
    warnings = [f"{source}: {change}; {remedy}" for change in changed_target(made, cfg.model.path)]
    prompts = paths.prompts_dir(cfg)
    for name in ("train.jsonl", "eval.jsonl"):
        file, before = prompts / name, made["inputs"].get(f"{prompts.name}/{name}")
        if before and file.exists() and sha256(file) != before:
            warnings.append(f"{source}: {file} has changed since: regen.force=true answers again")
    own = cfg.model.chat_template_kwargs
    asked = dict(made["settings"].get("model.chat_template_kwargs", own))
    thinking = made["settings"].get("regen.thinking", "model")
    if thinking != "model":
        asked["enable_thinking"] = thinking != "off"
    tokenizer, probe = load_tokenizer(cfg.model), [{"role": "user", "content": "x"}]
    try:
        alike = prompt_text(tokenizer, probe, asked) == prompt_text(tokenizer, probe, own)
    except Unrenderable:
        return warnings
    if not alike:
        warnings.append(
            f"{source}: its prompts were asked with {asked} for the chat template, which shows "
            f"them otherwise with model.chat_template_kwargs={own}: give all stages the same, or "
            "the draft learns answers behind prompts that were not theirs"
        )
    return warnings


def encode_files(cfg: Config, blocks: list[LineBlock], folder: Path) -> None:
    """Encode the blocks that an interrupted run has not left in `folder`."""
    folder.mkdir(exist_ok=True)
    missing = [block for block in blocks if not intact(folder, block)]
    if len(missing) < len(blocks):
        log.info("preprocess: %d of %d blocks are there", len(blocks) - len(missing), len(blocks))
    total = sum(block.stop for block in blocks) - sum(block.start for block in blocks)
    left = sum(block.stop - block.start for block in missing)
    with tqdm(
        total=total, initial=total - left, desc="preprocess", unit="B", unit_scale=True,
        disable=None,
    ) as bar:  # fmt: skip
        for block in encode_blocks(missing, cfg, folder) if missing else ():
            bar.update(block.stop - block.start)


def merge(cfg: Config, split: TokenSplit, blocks: list[LineBlock], partial: Path) -> TokenSplit:
    """Put the blocks of one file together, in order, as shards; count what is in them."""
    folder = partial / "blocks"
    writer = ShardWriter(partial, split.path.stem, cfg.preprocess.shard_tokens, split.shards)
    rejected = [folder / f"{block.name}.rejected.jsonl" for block in blocks]
    for block in blocks:
        arrays, account = read_encoded(folder, block)
        writer.add(arrays)
        split.account.update(account)
        split.lengths.append(np.diff(arrays["offsets"]))
        highest = arrays["ids"].max(initial=0)
        if highest >= len(split.counts_V):
            text = load_tokenizer(cfg.model).decode([highest])
            raise InputError(
                f"{split.path}: token {highest} ({text!r}) is none of the target's "
                f"{len(split.counts_V)}: the tokenizer in {cfg.model.path} belongs to another "
                "model, or a conversation spells a token that this one has no place for"
            )
        supervised = arrays["ids"][arrays["turns"] > 0]
        split.counts_V += np.bincount(supervised, minlength=len(split.counts_V))
        packed = torch.from_numpy(arrays["turns"]).long(), torch.from_numpy(split.lengths[-1])
        split.reasons.update(nothing_to_learn(cfg.draft, [packed]))
    writer.flush()
    if any(path.exists() for path in rejected):
        with (partial / f"{split.path.stem}.rejected.jsonl").open("wb") as out:
            for path in rejected:
                if path.exists():
                    with path.open("rb") as part:
                        shutil.copyfileobj(part, out)
    text = account_text(split)
    log.info("preprocess: %s: %s", split.path, text or "empty")
    if split.path.stem == "train" and not split.shards:
        raise InputError(
            f"{split.path}: no conversation is left to train on ({text or 'it is empty'})"
        )
    refuse_nothing(cfg.draft, str(split.path), split.reasons, split.account["sequences"])
    return split


def account_text(split: TokenSplit) -> str:
    """What became of a file's conversations; "" of an empty one."""
    account = split.account
    parts = [f"{account[what]} {what}" for what in ("read", "kept", "truncated") if account[what]]
    if account["changed"]:
        more = account["sequences"] - account["kept"]
        tokens = sum(int(lengths.sum()) for lengths in split.lengths) - account["apart"]
        parts.append(
            f"{account['changed']} of them as {account['changed'] + more} sequences "
            f"({account['apart'] / max(1, tokens):+.0%} tokens; not with "
            "preprocess.changed_turns=leave_out), as the chat template changes earlier answers"
        )
    parts += [f"{n} set aside: {reason}" for reason, n in set_aside(account).items()]
    parts += [
        f"{n} answers left out: {reason}"
        for reason, n in set_aside(account, prefix="turns left out: ").items()
    ]
    return ", ".join(parts)


def left_out(report: dict[str, Any]) -> str:
    """What is not trained on, by split, for the last line; "" when nothing is."""
    parts = []
    for name in ("train", "eval"):
        entry = report[name]
        counts = {f"set aside ({why})": n for why, n in entry["set_aside"].items()}
        counts |= {"cut at max_length": entry["truncated"]} if entry["truncated"] else {}
        counts |= {f"answers ({why})": n for why, n in entry["answers_left_out"].items()}
        counts |= {f"of no use ({why})": n for why, n in entry["nothing_to_learn"].items()}
        if counts:
            parts.append(f"{name}, {entry['read']} read: {listed(counts)}")
    return "; left out of ".join(["", *parts])


def set_aside(account: Counter[str], most: int = 20, prefix: str = "set aside: ") -> dict[str, int]:
    """Conversations left out by reason, the most frequent first, the rare ones together."""
    counts = Counter(
        {k.removeprefix(prefix): n for k, n in account.items() if k.startswith(prefix)}
    )
    reasons = dict(counts.most_common(most))
    others = counts.total() - sum(reasons.values())
    return {**reasons, "other reasons": others} if others else reasons


def describe(split: TokenSplit, in_draft_V: Ints, row: int) -> dict[str, Any]:
    """The entry of report.json for one split."""
    lengths = np.concatenate([np.zeros(0, np.int64), *split.lengths])
    quantiles = np.quantile(lengths, (0.05, 0.5, 0.95, 1)) if len(lengths) else np.zeros(4)
    tokens, supervised = int(lengths.sum()), int(split.counts_V.sum())
    account = split.account
    return {
        "read": account["read"],
        "conversations": account["kept"],
        "truncated": account["truncated"],
        "set_aside": set_aside(account),
        "sequences": account["sequences"],
        "sequences_apart": account["sequences"] - account["kept"],
        "tokens_apart": account["apart"],
        "answers_left_out": set_aside(account, prefix="turns left out: "),
        "nothing_to_learn": dict(split.reasons),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / max(1, tokens),
        "lengths": dict(zip(("p5", "p50", "p95", "max"), quantiles.tolist(), strict=True)),
        "turns": account["turns"],
        "turns_with_end": account["closed"],
        "turns_cut": account["cut"],
        "answers_checked": account["checked"],
        "answers_misread": account["misread"],
        "thoughts_not_shown": account["thoughtless"],
        "prompts_checked": account["prompts_checked"],
        "prompts_unlike": account["prompts_unlike"],
        "coverage": float(split.counts_V[in_draft_V].sum()) / max(1, supervised),
        "packing": packing(lengths, row),
    }


def doubts(name: str, entry: dict[str, Any], end: str | None = None) -> list[str]:
    """What a user should look at before training.

    Args:
        name: of the split.
        entry: its part of report.json.
        end: what the chat template writes behind an answer, if that is a token.
    """
    if not entry["conversations"]:
        return []
    warnings = []
    if entry["coverage"] < ENOUGH:
        warnings.append(
            f"the draft's vocabulary covers {entry['coverage']:.1%} of the supervised tokens of "
            f"{name}: it can never propose the others; raise draft.draft_vocab_size"
        )
    if not entry["turns_with_end"] and end and not entry["turns_cut"]:
        warnings.append(
            f"the chat template ends the answers of {name} with {end}, at which a server of this "
            "model does not stop: eos_token_id in its generation_config.json should name it "
            "(sft's export does)"
        )
    elif not entry["turns_with_end"]:
        why = "see eos_token_id in the model's generation_config.json and tokenizer"
        why = "all were cut at regen.max_tokens; raise it" if entry["turns_cut"] else why
        warnings.append(
            f"no answer of {name} ends with an end-of-turn token, so the draft never learns to "
            f"stop: {why}"
        )
    share = entry["supervised_share"]
    if share < 0.01 or share == 1:
        warnings.append(
            f"{share:.1%} of the tokens of {name} are supervised: see the chat template"
        )
    if entry["answers_misread"] > 0.02 * entry["answers_checked"]:
        warnings.append(
            f"the supervised tokens do not spell the answer in {entry['answers_misread']} of "
            f"{entry['answers_checked']} answers of {name} that were checked"
        )
    if entry["prompts_unlike"] > 0.02 * entry["prompts_checked"]:
        warnings.append(
            f"{entry['prompts_unlike']} of {entry['prompts_checked']} answers of {name} were given "
            "to prompts of another length than here: the server has another chat template, "
            "tokenizer or model, or its options show prompts otherwise"
        )
    if entry["thoughts_not_shown"] > 0.02 * entry["answers_checked"]:
        warnings.append(
            f"the chat template does not show the thoughts of {entry['thoughts_not_shown']} of "
            f"{entry['answers_checked']} answers of {name} that were checked: the draft learns none"
        )
    return warnings
