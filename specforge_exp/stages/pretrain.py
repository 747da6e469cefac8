"""pretrain: text + a causal model -> the model, trained on every token.

Streams `pretrain.sources` (files, the hub); writes checkpoints/<run_name>/: metrics.jsonl, step-*/,
run.json and export/, a plain Hugging Face folder. Run the same command again to continue: every
checkpoint has the place in the stream, so the rows that follow are the same.
"""

import logging
from functools import partial

import torch
from transformers import AutoTokenizer

from specforge_exp import paths
from specforge_exp.artifacts import Fingerprint, model_digest
from specforge_exp.causal.training import check_start, exported, train_causal
from specforge_exp.config import Config
from specforge_exp.config.settings import causal_settings
from specforge_exp.data.files import tell_passed_over
from specforge_exp.data.stream import TEXTS, RowStream, Tokens, held_out, text_digest
from specforge_exp.data.tokens import TokenSet
from specforge_exp.errors import InputError
from specforge_exp.target.files import not_loadable
from specforge_exp.training.loop import Splits, TrainingRun
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.running import Record, in_processes, joined_run, settled

log = logging.getLogger(__name__)


def pretrain(cfg: Config) -> float:
    """Train the model; returns the loss on held-out documents."""
    return exported(cfg, "pretrain", in_processes("pretrain", cfg, begin, pretrain_here))


def pretrain_here(cfg: Config, device: torch.device, ranks: Ranks) -> Record:
    """This process's part of a training that has not ended; the run's record."""
    own = cfg.pretrain
    tokens = tokens_of(cfg)
    splits = Splits(
        RowStream(own.sources, tokens, cfg.max_length, own.eval_documents, own.workers),
        TokenSet([ranks.decided(partial(held_out, own, tokens, cfg.max_length))]),
    )
    run = joined_run(cfg, fingerprint_of(cfg), ranks)
    return train_causal(cfg, device, splits, run)


def begin(cfg: Config, world: int) -> Record | None:
    """The record of a complete run, or None: it is to be made.

    Raises:
        InputError: as `settled` and `check_start`; or nothing says what to read or when to end.
    """
    check_start(cfg, "pretrain")
    if not cfg.pretrain.sources:
        raise InputError(
            "pretrain.sources is empty; name text, e.g. 'pretrain.sources=[{path: folder}]'"
        )
    if cfg.max_steps is None:
        raise InputError("pretrain: a stream has no end: max_steps=... says how long to train")
    if cfg.model.init == "weights" and (cfg.seeds > 1 or cfg.seed):
        raise InputError(
            f"pretrain: seed={cfg.seed} and seeds={cfg.seeds} change no number of a run that "
            "begins with the model's weights and reads its text in order: leave out seed and "
            "seeds, or begin with random weights (model.init=random)"
        )
    run = TrainingRun(paths.run_dir(cfg), fingerprint_of(cfg), Ranks(0, world))
    for source in cfg.pretrain.sources:
        tell_passed_over(source.path, TEXTS)
    return settled(cfg, "pretrain", run)


def tokens_of(cfg: Config) -> Tokens:
    """The model's tokenizer, as the processes that tokenise get it.

    Raises:
        InputError: there is none, or it has no token for the end of a text.
    """
    path = cfg.model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(not_loadable(cfg.model, error)) from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has no tokenizer.json, or no end-of-text token")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # tokenizer.json may ask for either, and the library's own call ignores
    backend.no_padding()  # what it asks for
    return Tokens(backend.to_str(), tokenizer.eos_token_id)


def fingerprint_of(cfg: Config) -> Fingerprint:
    """What a run depends on: its text, its model and every option that changes a number."""
    inputs = {source.path: text_digest(source) for source in cfg.pretrain.sources}
    inputs["the model"] = model_digest(cfg.model.path)
    return Fingerprint(inputs, causal_settings(cfg, "pretrain"))
