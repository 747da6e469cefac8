"""One side of a split alone: workers without a training, or trainers without workers.

For looking at how fast each is. Nothing is read of a run and nothing written.

Shape suffixes: T tokens, H hidden, A auxiliary states, F both side by side.
"""

import logging
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from specforge_exp.config import Config
from specforge_exp.inference.worker import TargetWorker
from specforge_exp.training.batches import Batch
from specforge_exp.training.features import Features, Take, in_order, joined
from specforge_exp.training.loop import Splits, add_gradients, planned, total_steps, windows
from specforge_exp.training.objective import Objective
from specforge_exp.training.optimizer import make_optimizer, take_step
from specforge_exp.training.progress import WindowLog
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.schedule import learning_rate
from specforge_exp.training.speed import peak_flops
from specforge_exp.training.streamed import Stream

log = logging.getLogger(__name__)

STEPS = 20
"""Where max_steps says nothing."""


def steps_of(cfg: Config, splits: Splits) -> range:
    """Those that are tried."""
    return range(min(cfg.max_steps or STEPS, total_steps(cfg, splits.train)))


def workers_alone(cfg: Config, splits: Splits, stream: Stream, ranks: Ranks) -> str:
    """Ask for the states of the first steps and take them as fast as they come; what to say of it.

    They cross as in a training, in its order and within its buffer, up to the trainers' devices.
    """
    features, count, waited = stream.features({1: splits.train, -1: splits.eval}), 0, 0.0
    plans = planned(cfg, splits.train, steps_of(cfg, splits), ranks, stream.device)
    began = fetching = time.monotonic()
    for _, states in in_order(features, plans):
        waited += time.monotonic() - fetching
        count += sum(len(last_TH) for _, last_TH in states)
        fetching = time.monotonic()
    seconds, tokens = max(ranks.gather(fetching - began)), sum(ranks.gather(count))
    metrics = stream.measured(seconds, ranks)
    speed = tokens / seconds
    figures = {"seconds": seconds, "tokens": tokens, "tokens_per_s": speed}
    figures["of never idle workers"] = speed / max(metrics["worker_busy"], 1e-9)
    figures |= {"mb_per_s": speed * features.token_bytes / 2**20, "data_wait": waited / seconds}
    return said(cfg, figures | metrics)


def trainer_alone(
    cfg: Config, draft: nn.Module, objective: Objective, splits: Splits, ranks: Ranks
) -> str:
    """Train the first steps and forget them; what to say of it. The first one is not counted."""
    device, steps = next(draft.parameters()).device, steps_of(cfg, splits)
    optimizer = make_optimizer(cfg, draft, objective)
    counts = WindowLog(device, peak_flops(device) * ranks.world)
    fetching = time.monotonic()
    for window in windows(cfg, splits.train, objective, steps, ranks, device):
        counts.waited += time.monotonic() - fetching
        loss = add_gradients(draft, objective, window, ranks, counts)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), cfg.trainer.clip)
        take_step(optimizer, learning_rate(window.step, len(steps), cfg.lr, cfg.trainer))
        counts.end_window(float(loss))  # waits for a GPU
        if window.step == 0 and len(steps) > 1:
            counts = counts.next()
        fetching = time.monotonic()
    metrics = counts.metrics(ranks, objective.measure.means)
    shown = "seconds", "tokens_per_s", "mfu", "data_wait", "peak_memory_mb"
    step = {"steps": counts.windows, "seconds per step": metrics["seconds"] / counts.windows}
    return said(cfg, step | {name: metrics[name] for name in shown})


def said(cfg: Config, figures: dict[str, float]) -> str:
    """For people."""
    what = {
        "workers": "nothing was trained",
        "trainer": "the states were random numbers, so no loss means anything",
    }
    numbers = {name: f"{value:,.3f}".rstrip("0").rstrip(".") for name, value in figures.items()}
    listed = ", ".join(map(" ".join, numbers.items()))
    return f"target.alone={cfg.target.alone}: {listed}; {what[cfg.target.alone]}, nothing is kept"


class RandomStates(Stream):
    """What `Stream` is to a trainer, with nobody behind it.

    The target's embeddings, head and last layers are its own, read on the CPU and given back.

    Args:
        cfg: the training's.
        device: where the states go.
        ranks: this trainer among those of the run.
    """

    def __init__(self, cfg: Config, device: torch.device, ranks: Ranks) -> None:
        dtype, threads = cfg.model.dtype, torch.get_num_threads()
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        model = replace(cfg.model, dtype=dtype)
        self.cfg = replace(cfg, device="cpu", threads=threads, model=model)
        self.device = device
        self.generator = torch.Generator(device).manual_seed(cfg.seed * ranks.world + ranks.rank)
        self.drawn_TF = torch.empty(0)
        log.warning("train: no workers: the states are random numbers, so nothing here is a result")
        self.ends = self.fetch_ends()

    def of_target(self, what: str, *args: Any) -> Any:
        """As `Stream`, of a target that is there for this question."""
        return getattr(TargetWorker(self.cfg, torch.get_num_threads(), ""), what)(*args)

    def wait(self, answers: Any) -> Any:
        """They are there."""
        return answers

    def ask(self, batches: list[Batch]) -> Take:
        """One forward's for each batch."""
        return lambda: [self.drawn(sum(batch.lengths)) for batch in batches]

    def features(self, splits: Any) -> Features:
        """Random numbers, whatever the conversations; drawn where the draft is trained."""
        return Features(self.ask)

    def drawn(self, tokens: int) -> tuple[Tensor, Tensor]:
        """As many tokens' states; the same numbers again, as drawing them takes time."""
        hidden = self.ends.text.hidden_size
        if tokens > len(self.drawn_TF):
            shape = tokens, (len(self.ends.aux_layers) + 1) * hidden
            self.drawn_TF = torch.randn(
                shape, generator=self.generator, device=self.device, dtype=self.ends.model.dtype
            )
        states_TF = self.drawn_TF[:tokens]
        return joined([(states_TF[:, :-hidden], states_TF[:, -hidden:])])
