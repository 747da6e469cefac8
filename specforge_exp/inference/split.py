"""Which GPUs train and which run the target, and how far ahead states may be asked for."""

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.inputs import require
from specforge_exp.target import DTYPES, text_config
from specforge_exp.training.batches import largest_share
from specforge_exp.training.loop import EVAL_TOKENS
from specforge_exp.training.running import read_tokens

SHARED_MEMORY = Path("/dev/shm")
SMALLEST_STORE = 80 * 2**20
"""Bytes below which Ray refuses a store."""
ROOM = 1.1
"""Of a store: what its objects need beside their own bytes."""
GAPS = 1.3
"""The same of Mooncake's, whose objects lie in one piece each between others that come and go."""


@dataclass(frozen=True)
class Split:
    """A machine dealt out to trainers and workers."""

    trainers: int
    workers: int
    gpus: list[str]
    """The workers', as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    threads: int
    """Of a worker on a CPU."""
    token_bytes: int
    """Of one token's states."""
    buffer: int
    """Bytes that all trainers together may have asked for and not used yet."""
    store: int
    """Bytes of the store that holds them: Ray's, or with a `segment` what else crosses."""
    segment: int = 0
    """Bytes of Mooncake's memory that holds them; 0: Ray's store does."""

    @property
    def ahead(self) -> int:
        """One trainer's part of the buffer."""
        return self.buffer // self.trainers

    @property
    def memory(self) -> str:
        """Whose bytes those of the states are."""
        if self.segment:
            return "the machines that hold" if joins() else "a process of Mooncake's"
        return "shared memory"

    def lines(self, tokens_per_s: float | None = None) -> list[str]:
        """For people. How long a full buffer lasts is known when the workers' speed is."""
        where = f"GPU {', '.join(self.gpus)}" if self.gpus else "on CPUs"
        if joins():
            where = f"in the cluster at {os.environ['RAY_ADDRESS']}"
        tokens, seconds = self.buffer // self.token_bytes, "; a dry run measures no speed"
        if tokens_per_s:
            rate = self.workers * tokens_per_s
            seconds = f" = {tokens / rate:.1f} s of the workers at {rate:,.0f} tokens/s"
        return [
            f"target.placement=ray: {self.trainers} trainers, {self.workers} workers ({where}); "
            f"{self.token_bytes:,} bytes per token",
            f"buffer: {self.buffer / 1e9:.2f} GB = {tokens:,} tokens{seconds}; the store has "
            f"{(self.segment or self.store) / 1e9:.2f} GB of {self.memory}",
        ]


def split_of(cfg: Config, trainers: int | None = None, runs: int = 1) -> Split:
    """`make_split` for the run's tokens and the trainers of trainer.gpus or so many.

    Raises:
        InputError: tokens are missing, or as `make_split`.
    """
    tokens = require(cfg, "preprocess", "index.json")
    _, splits = read_tokens(tokens)
    forward = max(cfg.trainer.pack_tokens or EVAL_TOKENS, int(max(splits.eval.lengths, default=0)))
    return make_split(cfg, trainers or int(cfg.trainer.gpus), splits.train.lengths, forward, runs)


def make_split(cfg: Config, trainers: int, lengths: Any, forward: int, runs: int = 1) -> Split:
    """Deal out this machine, or count the trainers here and the workers of a cluster.

    Args:
        cfg: the training's.
        trainers: its processes.
        lengths: tokens of each training conversation.
        forward: tokens of the largest forward of an evaluation, at most.
        runs: trainings that share the workers, and what the buffer holds.

    Raises:
        InputError: the buffer is too small for a step, or vLLM is wanted and not there.
    """
    options, dtype = cfg.target, cfg.model.dtype
    if options.engine == "vllm" and not (options.python or find_spec("vllm")):
        raise InputError(
            "target.engine=vllm needs vLLM, whose versions are not ours: pip install vllm in an "
            "environment of its own and name its Python with target.python=..."
        )
    on_gpus = cfg.device != "cpu" and torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if on_gpus else "float32"
    text = text_config(cfg.model)
    width = text.hidden_size * DTYPES[dtype].itemsize
    fed_by = cfg.draft.features
    token_bytes = (fed_by + 1) * width
    size = cfg.trainer.batch_size * cfg.trainer.accumulate
    share = token_bytes * largest_share(lengths, size, trainers)
    everything = token_bytes * int(sum(lengths)) + 2 * trainers * share
    buffer = min(int(options.buffer_gb * 1e9), everything)
    if 2 * share > buffer // trainers:
        raise InputError(
            f"target.buffer_gb={options.buffer_gb:g}, but a step of trainer.batch_size * accumulate"
            f" = {size} conversations has states of up to {share / 1e9:.3g} GB for each of "
            f"{trainers} trainers, and two of them must fit: target.buffer_gb="
            f"{2 * share * trainers / 1e9 + 0.0005:.3f} or more, or smaller steps"
        )
    from specforge_exp.serving.gpus import visible_gpus  # loads an HTTP client

    ends = 2 * text.vocab_size * width
    more = (runs - 1) * trainers * max(token_bytes * forward, share)
    states, both = buffer + trainers * token_bytes * forward, trainers * ends
    apart = options.store == "mooncake"
    store = int(ROOM * (both if apart else states + both + more))
    gpus = visible_gpus()[-options.gpus :] if on_gpus and not joins() else []
    return Split(
        trainers, options.workers, gpus, cfg.threads or max(1, torch.get_num_threads() // trainers),
        token_bytes, buffer, max(store, SMALLEST_STORE), int(GAPS * states) if apart else 0,
    )  # fmt: skip


def check_shared_memory(split: Split) -> None:
    """Refuse a store that shared memory has no room for: Ray would put it on a disk.

    Raises:
        InputError: there is less.
    """
    if SHARED_MEMORY.exists() and (free := shutil.disk_usage(SHARED_MEMORY).free) < split.store:
        raise InputError(
            f"{SHARED_MEMORY} has {free / 1e9:.2f} GB free, but the store of states needs "
            f"{split.store / 1e9:.2f} GB: lower target.buffer_gb, or give the container more "
            "(docker run --shm-size)"
        )


def joins() -> bool:
    """Whether the workers are to live in a cluster that is there already."""
    return bool(os.environ.get("RAY_ADDRESS"))
