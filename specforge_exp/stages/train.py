"""train: tokens + target -> draft.

Reads datasets/<data>--<model>.tokens/; writes checkpoints/<run_name>/: metrics.jsonl, step-*/ and,
at the end, run.json. Run the same command again to continue.
"""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_exp import paths
from specforge_exp.artifacts import Fingerprint, read_record, require, reusable
from specforge_exp.checkpoint import step_folders
from specforge_exp.config import Config, locate
from specforge_exp.errors import InputError
from specforge_exp.provenance import describe, model_digest, sha256, write_json
from specforge_exp.target import load_target, set_up_torch
from specforge_exp.tokens import read_split
from specforge_exp.training.batches import Batch
from specforge_exp.training.features import cached, uncached
from specforge_exp.training.loop import Objective, Splits, fit, summary
from specforge_exp.training.objective import Outcome, Sample

log = logging.getLogger(__name__)


def train(cfg: Config) -> float:
    """Train one draft; returns the simulated accepted length on held-out conversations."""
    folder = paths.run_dir(cfg)
    tokens = require(
        paths.tokens_dir(cfg) / "index.json", "python preprocess.py (same options)"
    ).parent
    fingerprint = fingerprint_of(cfg, tokens)
    again = "trainer.resume=false"
    if not cfg.trainer.resume:
        start_over(folder)
    if reusable(folder / "run.json", fingerprint, False, "train", again):
        return float(read_record(folder / "run.json")["evaluation"]["simulated_length"])
    device = set_up_torch(cfg)
    splits = Splits(read_split(tokens, "train"), read_split(tokens, "eval"))
    if not len(splits.eval):
        raise InputError(
            f"{tokens} has no held-out conversation to evaluate on; set data.eval or raise "
            f"data.split_eval={cfg.data.split_eval}"
        )
    target = load_target(cfg.model, device, cfg.model.dtype)
    mapping = torch.load(tokens / "vocab_mapping.pt", weights_only=True)
    draft = locate(cfg.draft._target_).new(target, cfg.draft, mapping, cfg.seed).to(device)
    features = (cached if cfg.trainer.cache_features else uncached)(target.features)
    loss = (locate(cfg.loss._target_), cfg.loss)

    def denominators(batch: Batch) -> Tensor:
        found: Tensor = draft.denominators(cfg.draft, batch.turns_BT)
        return found

    def forward(batch: Batch, window_K: Tensor) -> Outcome:
        aux_BTA, last_BTH = features(batch)
        sample = Sample(batch.ids_BT, batch.turns_BT, aux_BTA, last_BTH)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            outcome: Outcome = draft.objective(sample, target.head, loss, cfg.draft, window_K)
        return outcome

    log.info(
        "train: %s: %d conversations, %d held out, %.1fM trained parameters, on %s",
        cfg.run_name,
        len(splits.train),
        len(splits.eval),
        count(draft) / 1e6,
        device,
    )
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = fit(cfg, draft, Objective(denominators, forward), splits, folder, fingerprint)
    record = describe(cfg, fingerprint.inputs, fingerprint.settings)
    write_json(folder / "run.json", {**record, "evaluation": evaluation})
    log.info("train: complete: %s: %s", folder, summary(evaluation))
    return evaluation["simulated_length"]


def start_over(folder: Path) -> None:
    """Forget a run's checkpoints and its record."""
    (folder / "run.json").unlink(missing_ok=True)
    for checkpoint in step_folders(folder):
        shutil.rmtree(checkpoint)


def count(module: torch.nn.Module) -> int:
    """Trained parameters."""
    return sum(weight.numel() for weight in module.parameters())


def fingerprint_of(cfg: Config, tokens: Path) -> Fingerprint:
    """What a run depends on: its tokens, its target and every option that changes a number."""
    inputs = {
        tokens.name: sha256(tokens / "run.json"),
        "the target": model_digest(cfg.model.path),
    }
    settings: dict[str, Any] = {
        name: vars(cfg)[name] for name in ("lr", "seed", "epochs", "max_steps")
    }
    quiet = ("log_every", "eval_every", "save_every", "keep_last", "resume", "cache_features")
    for group, node in (("draft", cfg.draft), ("loss", cfg.loss), ("trainer", cfg.trainer)):
        for key, value in asdict(node).items():
            if not (key in quiet or key == "lrs"):
                settings[f"{group}.{key}"] = value
    settings["model.aux_layers"] = cfg.model.aux_layers
    return Fingerprint(inputs, settings)
