"""sft: tokens of conversations + a causal model -> the model, tuned on the assistant's turns.

Reads datasets/<data>--<model>.tokens/ (prep and preprocess; preprocess.source=prep takes the
answers that came with the data); writes checkpoints/<run_name>/: metrics.jsonl, step-*/, run.json
and export/, a plain Hugging Face folder. Run the same command again to continue.
"""

import logging
from functools import partial
from pathlib import Path

import torch

from specforge_exp import paths
from specforge_exp.artifacts import Fingerprint, model_digest, sha256
from specforge_exp.causal.training import check_start, exported, train_causal
from specforge_exp.config import Config
from specforge_exp.config.settings import causal_settings
from specforge_exp.data.tokens import read_split
from specforge_exp.inputs import require
from specforge_exp.target import check_length, text_config
from specforge_exp.training.loop import Splits, TrainingRun
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.running import (
    Record,
    check_held_out,
    check_tokens,
    in_processes,
    joined_run,
    settled,
)

log = logging.getLogger(__name__)


def sft(cfg: Config) -> float:
    """Tune the model; returns the loss on held-out conversations."""
    return exported(cfg, "sft", in_processes("sft", cfg, begin, sft_here))


def sft_here(cfg: Config, device: torch.device, ranks: Ranks) -> Record:
    """This process's part of a training that has not ended; the run's record."""
    tokens = paths.tokens_dir(cfg)
    run = joined_run(cfg, fingerprint_of(cfg, tokens), ranks)
    vocabulary = text_config(cfg.model).vocab_size
    splits = Splits(*(read_split(tokens, name, vocabulary) for name in ("train", "eval")))
    ranks.decided(partial(check_held_out, cfg, splits.eval))
    return train_causal(cfg, device, splits, run)


def begin(cfg: Config, world: int) -> Record | None:
    """The record of a complete run, or None: it is to be made.

    Raises:
        InputError: as `settled` and `check_start`; or tokens are missing, or were cut at another
            length.
    """
    check_start(cfg, "sft")
    tokens = require(cfg, "preprocess", "index.json")
    check_tokens(cfg, tokens, {"max_length": cfg.max_length})
    if warning := check_length(cfg.model, cfg.max_length):
        log.warning("sft: warning: %s", warning)
    run = TrainingRun(paths.run_dir(cfg), fingerprint_of(cfg, tokens), Ranks(0, world))
    return settled(cfg, "sft", run)


def fingerprint_of(cfg: Config, tokens: Path) -> Fingerprint:
    """What a run depends on: its tokens, its model and every option that changes a number."""
    inputs = {
        tokens.name: sha256(tokens / "run.json"),
        "the model": model_digest(cfg.model.path),
    }
    return Fingerprint(inputs, causal_settings(cfg, "sft"))
