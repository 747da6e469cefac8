"""preprocess: conversations -> token ids, supervised turns and the draft's vocabulary.

Reads datasets/<data>--<model>/ (or datasets/<data>/ with preprocess.source=prep); writes
datasets/<data>--<model>.tokens/. Loss masks come from the target's own chat template.
"""

import json
import logging
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig

from specforge_exp import paths
from specforge_exp.artifacts import Fingerprint, require, reusable, writing
from specforge_exp.chat import Encoded, Unrenderable, encode, eos_token_ids
from specforge_exp.config import Config
from specforge_exp.conversations import read_jsonl, write_jsonl
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.errors import InputError
from specforge_exp.provenance import model_digest, sha256
from specforge_exp.target import load_tokenizer
from specforge_exp.tokens import ShardWriter, read_split, supervised_counts

log = logging.getLogger(__name__)


def preprocess(cfg: Config) -> Path:
    """Write the token shards of this data set for this target; returns their folder."""
    folder = paths.tokens_dir(cfg)
    source = paths.regen_dir(cfg) if cfg.preprocess.source == "regen" else paths.prompts_dir(cfg)
    command = f"python {cfg.preprocess.source}.py (with the same options)"
    if cfg.preprocess.source == "regen":
        command += ", or take the data's own answers with preprocess.source=prep"
    files = {name: require(source / f"{name}.jsonl", command) for name in ("train", "eval")}
    inputs = {f"{source.name}/{path.name}": sha256(path) for path in files.values()}
    inputs["the target"] = model_digest(cfg.model.path)
    settings = {
        "preprocess.source": cfg.preprocess.source,
        "preprocess.overlong": cfg.preprocess.overlong,
        "max_length": cfg.max_length,
        "draft.draft_vocab_size": cfg.draft.draft_vocab_size,
        "model.chat_template_kwargs": cfg.model.chat_template_kwargs,
    }
    fingerprint = Fingerprint(inputs, settings)
    if reusable(folder / "run.json", fingerprint, cfg.preprocess.force, "preprocess"):
        return folder
    tokenizer = load_tokenizer(cfg.model)
    with writing(folder, fingerprint, cfg) as partial:
        index = {name: encode_file(cfg, tokenizer, path, partial) for name, path in files.items()}
        (partial / "index.json").write_text(json.dumps(index, indent=2) + "\n")
        vocabulary = AutoConfig.from_pretrained(cfg.model.path).get_text_config().vocab_size
        counts_V = supervised_counts(read_split(partial, "train"), vocabulary)
        size = cfg.draft.draft_vocab_size or vocabulary
        mapping = vocabulary_mapping(counts_V, size)
        torch.save(mapping, partial / "vocab_mapping.pt")
        covered = counts_V[mapping["t2d"]].sum().item() / max(1, counts_V.sum().item())
        log.info(
            "preprocess: the draft's %d tokens cover %.2f %% of the answers", size, 100 * covered
        )
    return folder


def encode_file(
    cfg: Config, tokenizer: object, path: Path, partial: Path
) -> list[dict[str, object]]:
    """Encode one file into shards; what does not fit is set aside, counted and reported."""
    eos = eos_token_ids(cfg.model.path, tokenizer)
    writer = ShardWriter(partial, path.stem, cfg.preprocess.shard_tokens)
    accounts: Counter[str] = Counter()
    rejected = []
    for record in tqdm(read_jsonl(path), desc=f"preprocess {path.stem}", unit="conv", disable=None):
        accounts["read"] += 1
        try:
            messages, kwargs = record["conversations"], cfg.model.chat_template_kwargs
            encoded = fit(encode(tokenizer, messages, kwargs, eos), cfg, accounts, record["id"])
        except Unrenderable as error:
            reason = str(error)
            accounts[f"set aside: {reason}"] += 1
            rejected.append({"reason": reason, **record})
            continue
        accounts["kept"] += 1
        writer.add(encoded)
    writer.flush()
    if rejected:
        write_jsonl(partial / f"{path.stem}.rejected.jsonl", rejected)
    report = ", ".join(f"{count} {what}" for what, count in accounts.items())
    log.info("preprocess: %s: %s", path, report or "empty")
    if path.stem == "train" and not writer.shards:
        raise InputError(f"{path}: no conversation is left to train on ({report or 'it is empty'})")
    return writer.shards


def fit(encoded: Encoded, cfg: Config, accounts: Counter[str], name: str) -> Encoded:
    """The conversation within max_length; raises Unrenderable when it is to be left out."""
    if len(encoded.ids) > cfg.max_length:
        if cfg.preprocess.overlong == "error":
            raise InputError(
                f"conversation {name} has {len(encoded.ids)} tokens, above "
                f"max_length={cfg.max_length}; raise it, or set "
                "preprocess.overlong=truncate or drop"
            )
        if cfg.preprocess.overlong == "drop":
            raise Unrenderable("longer than max_length")
        accounts["truncated"] += 1
        encoded = Encoded(encoded.ids[: cfg.max_length], encoded.turns[: cfg.max_length])
    if not any(encoded.turns):
        raise Unrenderable("no assistant token")
    return encoded
