"""The training loop. It knows an objective and its counts, not a draft's architecture.

From a step to its loss and gradients:

    fit                            one optimiser step after the other
      add_gradients                forward and backward of a window, for each of its samples
        Objective.forward          stages/train.py: binds the target's head, the loss and options
          Draft.forward            drafts/draft.py: a module's call, so that a sharding's hooks run
            Eagle3.objective       drafts/eagle3/draft.py, or another draft's: its rows and states
              head_and_loss        drafts/head_loss.py: logits, loss and gradients in one pass
                visit_rows         the target's distribution, made once for each of its positions
                  visit_chunk      logits of some rows; gradients of head and norm go to `.grad`
                    visit_block    values of some rows; their logits become gradients
                      opd_closed   losses.py: the formulas
        loss.backward()            the way back, from the gradient of the draft's states
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from specforge_exp.config import Config
from specforge_exp.data.stream import RowStream
from specforge_exp.data.tokens import TokenSet
from specforge_exp.errors import InputError
from specforge_exp.interrupt import Interrupt
from specforge_exp.records import write_record
from specforge_exp.sharding import gradient_of, is_sharded, whole
from specforge_exp.training.batches import (
    Batch,
    dealt,
    draw_of,
    lay_out,
    make_batch,
    moved,
    share,
    window_of,
)
from specforge_exp.training.checkpoint import (
    Snapshot,
    forget_old,
    newest_checkpoint,
    restore,
    save_checkpoint,
    start_over,
    step_folders,
    take_snapshot,
)
from specforge_exp.training.features import in_order
from specforge_exp.training.objective import Measure, Objective
from specforge_exp.training.optimizer import make_optimizer, take_step
from specforge_exp.training.progress import WindowLog
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.schedule import learning_rate
from specforge_exp.training.speed import peak_flops
from specforge_exp.training.tracking import best_step, open_tracker
from specforge_exp.training.watching import TrainingRun, Window, watched

log = logging.getLogger(__name__)

EVAL_TOKENS = 4096
"""Tokens of held-out conversations in one forward, unless trainer.pack_tokens says otherwise."""


@dataclass(frozen=True)
class Splits:
    """Training and held-out conversations."""

    train: Any
    """A TokenSet, or a RowStream, which has no end."""
    eval: TokenSet


def fit(
    cfg: Config, draft: nn.Module, objective: Objective, splits: Splits, run: TrainingRun
) -> dict[str, float]:
    """Train until `epochs` or `max_steps` and return the last evaluation.

    Continues from the newest checkpoint of the same fingerprint: weights, moments, random state and
    a half-finished line of metrics come from it, the order of the data from seed and step. SIGTERM
    and SIGINT save a checkpoint and are raised again.

    Raises:
        InputError: the newest checkpoint was made with other options or inputs, or the loss is
            not a number.
    """
    device, options, ranks = next(draft.parameters()).device, cfg.trainer, run.ranks
    measure = objective.measure
    optimizer = make_optimizer(cfg, draft, objective)
    window_log = WindowLog(device, peak_flops(device) * ranks.world)
    start = (
        resume(run, draft, optimizer, window_log, splits.train)
        if options.resume
        else ranks.decided(lambda: start_over(run.folder))
    )
    total = total_steps(cfg, splits.train)
    tracker = open_tracker(cfg, run.folder, start) if ranks.rank == 0 else None
    evaluation: dict[str, float] = {}
    bar = tqdm(
        watched(
            cfg, run, draft,
            windows(cfg, splits.train, objective, range(start, total), ranks, device),
        ),
        initial=start, total=total, desc="train", unit="step",
        disable=None if ranks.rank == 0 else True,
    )  # fmt: skip
    with Interrupt() as interrupt:
        fetching = time.monotonic()
        for window in bar:
            window_log.waited += time.monotonic() - fetching
            loss = add_gradients(draft, objective, window, ranks, window_log)
            totals = torch.stack([loss, torch.full_like(loss, interrupt.number)])
            ranks.add_up(totals)
            norm = whole(torch.nn.utils.clip_grad_norm_(draft.parameters(), options.clip))
            # The one time that a window waits for a GPU.
            window_loss, stop, grad_norm = torch.cat([totals, norm.double()[None]]).tolist()
            done = window.step + 1
            for name, value in (("loss", window_loss), ("norm of the gradient", grad_norm)):
                if not math.isfinite(value):  # before it reaches the weights or a checkpoint
                    raise InputError(not_finite(cfg, run, f"{name} is {value}", window))
            window_log.end_window(window_loss)
            rate = learning_rate(window.step, total, cfg.lr, options)
            take_step(optimizer, rate)
            last, best = done == total, False
            if done % options.log_every == 0 or last:
                metrics = {"step": done, "epoch": window.epoch, "lr": rate}
                metrics |= {"grad_norm": grad_norm, **window_log.metrics(ranks, measure.means)}
                metrics |= objective.features.measured(metrics["seconds"] - window_log.past, ranks)
                window_log = window_log.next()
                show(bar, metrics, measure)
                if tracker:
                    tracker.log(metrics)
            if done % options.eval_every == 0 or last:
                evaluation = evaluate(cfg, draft, objective, splits.eval, run, done)
                log.info("step %d: held out: %s", done, measure.summary(evaluation))
                if tracker:
                    tracker.log({"step": done, **{f"eval/{k}": v for k, v in evaluation.items()}})
                best = ranks.gather(
                    options.keep_best and best_step(run.folder, measure) in (None, done)
                )[0]
            if done % options.save_every == 0 or last or best or stop:
                partial = window_log.state(ranks) | position(splits.train, done)
                snapshot = take_snapshot(done, draft, optimizer, partial, ranks.rank == 0)
                save(cfg, run, snapshot, measure)
            if stop and not last:
                log.info("train: stopped after step %d; run the same command to continue", done)
                interrupt.reraise()
            fetching = time.monotonic()
    if tracker:
        prune(cfg, run, measure)  # a kill may have come between the last save and this
        tracker.close()
    return evaluation or evaluate(cfg, draft, objective, splits.eval, run, total)


def show(bar: Any, metrics: dict[str, float], measure: Measure) -> None:
    """Say how far training is, once per line of metrics."""
    shown = {"loss": metrics["loss"], measure.short: metrics[measure.best]}
    bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
    if measure.line:
        log.info("step %d: %s", metrics["step"], measure.line(metrics))


def position(tokens: TokenSet | RowStream, step: int) -> dict[str, Tensor]:
    """What a checkpoint keeps of where a stream is; a set of conversations needs nothing."""
    return tokens.state(step) if isinstance(tokens, RowStream) else {}


def total_steps(cfg: Config, tokens: TokenSet | RowStream) -> int:
    """Optimiser steps of the whole run."""
    if isinstance(tokens, RowStream):
        assert cfg.max_steps is not None, "a stream has no end"
        return cfg.max_steps
    size = cfg.trainer.batch_size * cfg.trainer.accumulate
    whole = cfg.epochs * -(-len(tokens) // size)
    return min(whole, cfg.max_steps or whole)


def windows(
    cfg: Config,
    tokens: TokenSet | RowStream,
    objective: Objective,
    steps: range,
    ranks: Ranks,
    device: torch.device,
) -> Iterator[Window]:
    """This process's part of the windows of these steps; states of later ones may be on their way
    meanwhile, also over the end of an epoch and while held-out conversations are evaluated."""
    if isinstance(tokens, RowStream):
        plans = streamed(cfg, tokens, steps, ranks, device)
    else:
        plans = planned(cfg, tokens, steps, ranks, device)
    for window, states in in_order(objective.features, plans):
        objective.begin(window.step)
        yield replace(window, samples=objective.prepare(window.batches, states))


def streamed(
    cfg: Config, tokens: RowStream, steps: range, ranks: Ranks, device: torch.device
) -> Iterator[tuple[Window, list[Batch]]]:
    """This process's part of the windows of a stream."""
    for step, numbers, batches in dealt(cfg, tokens, steps, ranks, device):
        yield Window(step, 0, numbers, batches, []), batches


def planned(
    cfg: Config, tokens: TokenSet, steps: range, ranks: Ranks, device: torch.device
) -> Iterator[tuple[Window, list[Batch]]]:
    """This process's part of the windows of a set, in the order of the seed."""
    lengths = tokens.lengths
    size = cfg.trainer.batch_size * cfg.trainer.accumulate
    per_epoch = -(-len(lengths) // size)

    for step in steps:
        epoch, index = divmod(step, per_epoch)
        numbers = window_of(len(lengths), size, cfg.seed, epoch, index)
        mine = share(numbers, lengths, ranks.rank, ranks.world)
        parts = lay_out(mine, lengths, cfg.trainer)
        draw = draw_of(cfg.seed, epoch)
        batches = [replace(make_batch(tokens, part, device, draw), step=step) for part in parts]
        yield Window(step, epoch, numbers, batches, []), batches


def add_gradients(
    draft: nn.Module, objective: Objective, window: Window, ranks: Ranks, window_log: WindowLog
) -> Tensor:
    """Forward and backward of a window; gradients end up summed over all processes.

    Returns:
        This process's share of the window's loss, on the draft's device; [] float64.
    """
    parameters = [weight for weight in draft.parameters() if weight.requires_grad]
    window_K = divisors(objective, window.samples, ranks, parameters[0].device)
    loss = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    samples = [*window.samples, *idle(draft, objective, window.samples, ranks)]
    for number, sample in enumerate(samples, 1):
        if not objective.sparing:
            share_again(draft, number == len(samples))
        outcome = objective.forward(sample, window_K)
        if outcome.loss.requires_grad:  # with the text's weight 0 and no proposal there is nothing
            outcome.loss.backward()
        window_log.add(outcome, sum(sample.lengths))
        loss += outcome.loss.detach()
    if not is_sharded(draft):
        ranks.add_up(*(gradient_of(weight) for weight in parameters))
    return loss


def idle(
    draft: nn.Module, objective: Objective, samples: Sequence[Batch], ranks: Ranks
) -> list[Batch]:
    """What a process runs while others run more: those that share the draft step together."""
    if not is_sharded(draft):
        return []
    return [objective.idle] * (max(ranks.gather(len(samples))) - len(samples))


def share_again(draft: nn.Module, last: bool) -> None:
    """Shared weights are gathered for a window's first forward, and gradients added up after its
    last: between them each process has both in full anyway while it works on a forward."""
    if isinstance(draft, FSDPModule):
        draft.set_requires_gradient_sync(last)
        draft.set_reshard_after_backward(last)


def divisors(
    objective: Objective, batches: Sequence[Batch], ranks: Ranks, device: torch.device
) -> Tensor:
    """What the sums of each step are divided by, over all processes; [K] float64."""
    window_K = torch.zeros(objective.steps, dtype=torch.float64)
    for batch in batches:
        window_K += objective.denominators(batch)
    window_K = moved(window_K, device)
    ranks.add_up(window_K)
    return window_K


def save(cfg: Config, run: TrainingRun, snapshot: Snapshot, measure: Measure) -> None:
    """The first process writes a checkpoint and removes old ones; the others wait for it."""
    if run.ranks.rank == 0:
        save_checkpoint(run.folder, snapshot, run.fingerprint, run.makers)
        prune(cfg, run, measure)
    run.ranks.wait()


def prune(cfg: Config, run: TrainingRun, measure: Measure) -> None:
    """Remove old checkpoints."""
    spared = best_step(run.folder, measure) if cfg.trainer.keep_best else None
    forget_old(run.folder, cfg.trainer.keep_last, spared)


def resume(
    run: TrainingRun,
    draft: nn.Module,
    optimizer: torch.optim.Optimizer,
    window_log: WindowLog,
    tokens: TokenSet | RowStream,
) -> int:
    """Restore the newest checkpoint, if any; returns the steps already done."""
    checkpoint = newest_checkpoint(run.folder)

    def step() -> int:
        changes = run.fingerprint.changes(checkpoint.record) if checkpoint else []
        if checkpoint and changes:
            name = run.folder.name + run.fingerprint.apart(checkpoint.record)
            raise InputError(
                f"{run.folder} holds a run that was made of something else: {'; '.join(changes)}. "
                f"Keep both under run_name={name}, or start this one over with trainer.resume=false"
            )
        return checkpoint.step if checkpoint else 0

    first, own = run.ranks.decided(step), checkpoint.step if checkpoint else 0
    if own != first:
        raise InputError(
            f"process {run.ranks.rank} finds step {own} in {run.folder}, the first one {first}: "
            "paths.checkpoints must be one folder that all machines see"
        )
    if checkpoint is None:
        return 0
    restore(checkpoint, draft, optimizer)
    window_log.restore(checkpoint.partial, run.ranks.rank)
    if isinstance(tokens, RowStream):
        tokens.restore(checkpoint.partial)
    log.info("train: continuing after step %d", checkpoint.step)
    before = checkpoint.record.get("makers", [])
    if {*before} - {*run.makers} and run.ranks.rank == 0:
        log.warning("train: steps up to here are of %s; now: %s", " and ".join(before), *run.makers)
    run.makers[:0] = [maker for maker in before if maker not in run.makers]
    return checkpoint.step


def not_finite(cfg: Config, run: TrainingRun, what: str, window: Window) -> str:
    """What to do about a loss or a gradient that is not a number."""
    names = ", ".join(map(str, window.numbers[:20]))
    rest = f" and {len(window.numbers) - 20} more" if len(window.numbers) > 20 else ""
    steps = step_folders(run.folder)
    saved = f"{steps[-1]} is kept" if steps else "nothing was saved yet"
    return (
        f"the {what} at step {window.step + 1}, on training conversations {names}{rest} "
        f"(counted from 0); {saved}. Lower lr={cfg.lr} or trainer.clip={cfg.trainer.clip}, or look "
        "at these conversations"
    )


@torch.no_grad()
def evaluate(
    cfg: Config,
    draft: nn.Module,
    objective: Objective,
    tokens: TokenSet,
    run: TrainingRun,
    step: int,
) -> dict[str, float]:
    """Loss and metrics over held-out conversations, with one normalisation over all of them.

    What each conversation gave to the metric that counts goes to evaluation.json, in the order of
    the file: intervals and comparisons between runs resample conversations.
    """
    device, ranks = next(draft.parameters()).device, run.ranks
    lengths = tokens.lengths
    mine = share(range(len(lengths)), lengths, ranks.rank, ranks.world)
    packed = replace(cfg.trainer, pack_tokens=cfg.trainer.pack_tokens or EVAL_TOKENS)
    parts = lay_out(mine, lengths, packed)
    batches = [make_batch(tokens, part, device) for part in parts]
    window_K = divisors(objective, batches, ranks, device)
    total, loss = WindowLog(device, 1.0), torch.zeros(1, dtype=torch.float64, device=device)
    by_number: dict[int, list[float]] = {}
    quiet = None if ranks.rank == 0 else True
    rounds = range(max(ranks.gather(len(batches))))
    asked = in_order(objective.features, ((i, batches[i : i + 1]) for i in rounds))
    bar = tqdm(asked, total=len(rounds), desc="evaluate", unit="batch", disable=quiet, leave=False)
    for index, states in bar:
        samples = objective.prepare(batches[index : index + 1], states)
        for sample in [*samples, *idle(draft, objective, samples, ranks)]:
            outcome = objective.forward(sample, window_K)
            total.add(outcome, sum(sample.lengths))
            loss += outcome.loss.double()
            if samples and outcome.pairs_B2 is not None:
                by_number |= dict(zip(parts[index], outcome.pairs_B2.tolist(), strict=True))
    ranks.add_up(loss)
    everybodys = {n: pair for part in ranks.gather(by_number) for n, pair in part.items()}
    pairs, measure = [everybodys[number] for number in sorted(everybodys)], objective.measure
    if ranks.rank == 0:
        values = [pair[0] for pair in pairs], [int(pair[1]) for pair in pairs]
        told = {"step": step, "held_out": tokens.digest}
        content = told | dict(zip(measure.pair, values, strict=True))
        write_record(run.folder / "evaluation.json", content)
    metrics = measure.means(total.everywhere(ranks).sums)
    return {"loss": float(loss), **metrics, **measure.intervals(pairs)}
