"""What pretrain and sft do with a model and its data."""

import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from specforge_exp.causal.export import export_model
from specforge_exp.causal.lean import spare
from specforge_exp.causal.model import Causal, choose_attention, new_model, patch, without_dropout
from specforge_exp.causal.objective import CAUSAL, causal_lm
from specforge_exp.config import Config
from specforge_exp.config.checks import refuse_others
from specforge_exp.errors import InputError
from specforge_exp.sharding import shard_model, without_numbers
from specforge_exp.target.anatomy import read_end
from specforge_exp.target.head import Ending
from specforge_exp.training.loop import Splits, TrainingRun, fit
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.running import Record, count, ended

log = logging.getLogger(__name__)


def check_start(cfg: Config, stage: str) -> None:
    """Refuse the drafts' way to begin with other weights, and what is for drafts alone."""
    if cfg.trainer.init is not None:
        raise InputError(
            f"trainer.init={cfg.trainer.init} is a draft's start; {stage} begins with a model's "
            "folder: model.path=<folder>, as <run>/export is one"
        )
    of_drafts = "onpolicy.name export.format export.push export.source"
    refuse_others(stage, cfg, of_drafts, "it trains and exports a model, no draft")


def train_causal(cfg: Config, device: torch.device, splits: Splits, run: TrainingRun) -> Record:
    """Train to the end; the run's record."""
    causal = load_causal(cfg, device, run.ranks)
    stage = run.fingerprint.settings["stage"]
    log.info(
        "%s: %s: %.1fM trained parameters, on %d x %s",
        stage, cfg.run_name, count(causal) / 1e6, run.ranks.world, device,
    )  # fmt: skip
    run.folder.mkdir(parents=True, exist_ok=True)
    evaluation = fit(cfg, causal, causal_lm(causal, device), splits, run)
    record = ended(cfg, run, evaluation)
    if run.ranks.rank == 0:
        log.info("%s: complete: %s: %s", stage, run.folder, CAUSAL.summary(evaluation))
    return record


def exported(cfg: Config, stage: str, record: Record) -> float:
    """Export what a run has trained, by one process; returns its loss."""
    if os.environ.get("RANK", "0") == "0":
        export_model(cfg, stage)
    return float(record["evaluation"]["loss"])


def load_causal(cfg: Config, device: torch.device, ranks: Ranks) -> Causal:
    """The model of `cfg.model` with fp32 weights, whole or this process's share of it.

    Raises:
        InputError: it cannot be loaded, or its packed conversations see each other.
    """
    shared = cfg.trainer.shard and ranks.world > 1
    numberless = bool(shared and ranks.rank)
    source = replace(cfg.model, init="random") if numberless else cfg.model
    with without_numbers() if numberless else nullcontext():
        model = new_model(source, cfg.seed)
    model.config.use_cache = False
    without_dropout(model)
    causal = Causal(model, cfg.causal)
    causal.ending, name = ranks.decided(partial(measured, causal, device))
    causal.take_attention(name)
    if device.type == "cuda" and cfg.causal.liger != "off":
        patch(model, cfg.causal.liger)  # its kernels run on a GPU alone, where the model is not yet
    else:
        spare(model)
    model.train()
    if cfg.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    causal.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if shared:
        shard_model(causal, causal.units, device, ranks.world, causal.compute_dtype)
    causal.to(device)
    return causal


def measured(causal: Causal, device: torch.device) -> tuple[Ending, str]:
    """What a model makes of its head's products, and the attention that it gets."""
    _, head = read_end(causal.model, causal.decoder)
    name = choose_attention(causal.model, causal.decoder, causal.cfg, device)
    log.info("attention: %s", name)
    return head.ending, name
