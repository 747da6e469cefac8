"""The training loop. It knows an objective and its counts, not a draft's architecture."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from specforge_exp.artifacts import Fingerprint
from specforge_exp.checkpoint import forget_old, newest_checkpoint, restore, save_checkpoint
from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.tokens import TokenSet
from specforge_exp.tracking import open_tracker
from specforge_exp.training.batches import Batch, epoch_order, make_batch
from specforge_exp.training.objective import Outcome
from specforge_exp.training.schedule import learning_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objective:
    """What is trained: `forward` gives a batch's share of an optimiser window's loss."""

    denominators: Callable[[Batch], Tensor]
    """What a batch adds to the divisors of the window, [K]; known before any forward."""
    forward: Callable[[Batch, Tensor], Outcome]
    """(batch, the window's divisors) -> loss and sums."""


@dataclass(frozen=True)
class Splits:
    """Training and held-out conversations."""

    train: TokenSet
    eval: TokenSet


def windows_of(cfg: Config, lengths: list[int], epoch: int) -> list[list[list[int]]]:
    """The optimiser windows of an epoch: each `accumulate` batches of conversation numbers."""
    batches = epoch_order(lengths, cfg.trainer.batch_size, cfg.seed, epoch)
    size = cfg.trainer.accumulate
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def fit(
    cfg: Config,
    draft: nn.Module,
    objective: Objective,
    splits: Splits,
    run_dir: Path,
    fingerprint: Fingerprint,
) -> dict[str, float]:
    """Train until `epochs` or `max_steps` and return the last evaluation.

    Continues from the newest checkpoint of the same fingerprint; the order of the data is a
    function of seed and step, so a resumed run sees what an uninterrupted one would have seen.

    Raises:
        InputError: the newest checkpoint was made with other options or inputs, or the loss is
            not a number.
    """
    device = next(draft.parameters()).device
    options = cfg.trainer
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=cfg.lr, weight_decay=options.weight_decay, fused=True
    )
    start = resume(run_dir, draft, optimizer, fingerprint) if options.resume else 0
    lengths = [len(ids) for ids in splits.train.ids]
    per_epoch = len(windows_of(cfg, lengths, 0))
    whole = cfg.epochs * per_epoch
    total = min(whole, cfg.max_steps or whole)
    tracker = open_tracker(cfg, run_dir, start)
    evaluation: dict[str, float] = {}
    window_log = WindowLog()
    windows: list[list[list[int]]] = []
    bar = tqdm(
        range(start, total), initial=start, total=total, desc="train", unit="step", disable=None
    )
    for step in bar:
        epoch, index = divmod(step, per_epoch)
        if index == 0 or not windows:
            windows = windows_of(cfg, lengths, epoch)
        batches = [make_batch(splits.train, numbers, device) for numbers in windows[index]]
        window_K = torch.stack([objective.denominators(batch) for batch in batches]).sum(0)
        for batch in batches:
            outcome = objective.forward(batch, window_K)
            outcome.loss.backward()
            window_log.add(outcome, batch)
        window_log.windows += 1
        if not math.isfinite(window_log.loss):  # before it reaches the weights or a checkpoint
            raise InputError(f"the loss is {window_log.loss} at step {step + 1}; lower lr={cfg.lr}")
        norm = torch.nn.utils.clip_grad_norm_(draft.parameters(), options.clip)
        rate = learning_rate(step, total, cfg.lr, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % options.log_every == 0 or done == total:
            metrics = {"step": done, "epoch": epoch, "lr": rate, "grad_norm": float(norm)}
            metrics |= window_log.metrics()
            window_log = WindowLog()
            tracker.log(metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", tau=f"{metrics['simulated_length']:.2f}")
        if done % options.eval_every == 0 or done == total:
            evaluation = evaluate(draft, objective, splits.eval, options.batch_size)
            tracker.log({"step": done, **{f"eval/{k}": v for k, v in evaluation.items()}})
            log.info("step %d: held out: %s", done, summary(evaluation))
        if done % options.save_every == 0 or done == total:
            save_checkpoint(run_dir, done, draft, optimizer, fingerprint)
            forget_old(run_dir, options.keep_last)
    tracker.close()
    return evaluation or evaluate(draft, objective, splits.eval, options.batch_size)


def resume(
    run_dir: Path, draft: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: Fingerprint
) -> int:
    """Restore the newest checkpoint, if any; returns the steps already done."""
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        return 0
    changes = fingerprint.changes(checkpoint.record)
    if changes:
        raise InputError(
            f"{run_dir} holds a run that was made of something else: {'; '.join(changes)}. "
            "Give this one another run_name, or start it over with trainer.resume=false"
        )
    restore(checkpoint, draft, optimizer)
    log.info("train: continuing after step %d", checkpoint.step)
    return checkpoint.step


class WindowLog:
    """Sums of what happened since the last line of metrics."""

    def __init__(self) -> None:
        self.windows = 0
        self.loss = 0.0
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        self.started = time.monotonic()

    def add(self, outcome: Outcome, batch: Batch) -> None:
        """Take the outcome of one forward."""
        self.loss += float(outcome.loss.detach())
        for name, value in outcome.sums.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.tokens += sum(batch.lengths)

    def metrics(self) -> dict[str, float]:
        """Means over what was taken; the loss is the mean of the windows'."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        metrics = {"loss": self.loss / max(1, self.windows), **means(self.sums)}
        metrics["tokens_per_s"] = self.tokens / seconds
        metrics["supervised_rows_per_s"] = float(self.sums["rows"].sum()) / seconds
        metrics["seconds"] = seconds
        return metrics


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Per-step means `name/k`, their mean over steps `name`, and the simulated accepted length."""
    rows_K = sums["rows"].clamp(min=1)
    found: dict[str, float] = {}
    for name, value in sums.items():
        if name in ("rows", "length", "length_slots"):
            continue
        mean_K = value / rows_K
        found[name] = float(value.sum() / rows_K.sum())
        found |= {f"{name}/{k}": float(v) for k, v in enumerate(mean_K)}
    found["simulated_length"] = float(sums["length"] / sums["length_slots"].clamp(min=1))
    found["supervised"] = float(sums["rows"].sum())
    return found


@torch.no_grad()
def evaluate(
    draft: nn.Module, objective: Objective, tokens: TokenSet, batch_size: int
) -> dict[str, float]:
    """Loss and metrics over held-out conversations, with one normalisation over all of them."""
    device = next(draft.parameters()).device
    order = sorted(range(len(tokens)), key=lambda number: len(tokens.ids[number]))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = [make_batch(tokens, numbers, device, held_out=True) for numbers in groups]
    window_K = torch.stack([objective.denominators(batch) for batch in batches]).sum(0)
    total = WindowLog()
    for batch in tqdm(batches, desc="evaluate", unit="batch", disable=None, leave=False):
        total.add(objective.forward(batch, window_K), batch)
    return {k: v for k, v in total.metrics().items() if not k.endswith(("_per_s", "seconds"))}


def summary(metrics: dict[str, float]) -> str:
    """One line of the numbers that matter."""
    return (
        f"loss {metrics['loss']:.4f}, simulated accepted length {metrics['simulated_length']:.3f}, "
        f"acceptance rate {metrics['alpha/0']:.3f}, top-1 {metrics['top1/0']:.3f}"
    )
