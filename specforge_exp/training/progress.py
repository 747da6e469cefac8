"""Sums of what happened since the last line of metrics, over all processes."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from specforge_exp.training.objective import Measure, Outcome
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.speed import peak_memory_mb

ONPOLICY = "onpolicy/"
"""Prefix of what is summed over proposals, not over rows of steps."""
PARTIAL = "log:"
"""Prefix of a half-finished log's tensors in a checkpoint."""
NUMBERS, SECONDS = PARTIAL + "numbers", PARTIAL + "seconds"


Means = Callable[[dict[str, Tensor]], dict[str, float]]
"""See `Measure.means`."""


class WindowLog:
    """Collects outcomes; `metrics` gives their means.

    Args:
        device: where training runs.
        peak: FLOP per second of all processes together at best.
    """

    def __init__(self, device: torch.device, peak: float) -> None:
        self.device, self.peak = device, peak
        self.loss = self.windows = self.tokens = self.flops = self.waited = 0.0
        self.sums: dict[str, Tensor] = {}
        self.past = 0.0  # seconds that a run which was interrupted had spent on the line
        self.started = time.monotonic()

    def next(self) -> "WindowLog":
        """An empty one."""
        return WindowLog(self.device, self.peak)

    def add(self, outcome: Outcome, tokens: int) -> None:
        """Take the outcome of one forward."""
        for name, value in outcome.sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
        self.tokens += tokens
        self.flops += outcome.flops

    def end_window(self, loss: float) -> None:
        """Take the loss of an optimiser window, summed over all processes."""
        self.loss += loss
        self.windows += 1

    def everywhere(self, ranks: Ranks) -> "WindowLog":
        """The same with what all processes took."""
        total = self.next()
        own_sums = {name: value.cpu() for name, value in self.sums.items()}
        own = self.tokens, self.flops, self.waited, own_sums
        for tokens, flops, waited, sums in ranks.gather(own):
            total.tokens += tokens
            total.flops += flops
            total.waited += waited / ranks.world
            for name, value in sums.items():
                total.sums[name] = total.sums.get(name, 0) + value
        total.loss, total.windows, total.started = self.loss, self.windows, self.started
        return total

    def metrics(self, ranks: Ranks, means: Means) -> dict[str, float]:
        """Means over what was taken; the loss is the mean of the windows'.

        tokens_per_s counts every token of the conversations, supervised_tokens_per_s the slots
        whose first step is trained; data_wait is the share of the time in which batches and the
        target's states were fetched.
        """
        seconds = max(self.seconds(), 1e-9)
        total, windows = self.everywhere(ranks), max(1, self.windows)
        sums = dict(total.sums)
        if ONPOLICY + "loss" in sums:
            sums[ONPOLICY + "loss"] = sums[ONPOLICY + "loss"] / windows
        return {
            "loss": self.loss / windows,
            **means(sums),
            "tokens_per_s": total.tokens / seconds,
            "supervised_tokens_per_s": float(total.sums["rows"][0]) / seconds,
            "mfu": total.flops / seconds / self.peak,
            "peak_memory_mb": peak_memory_mb(self.device),
            "data_wait": total.waited / seconds,
            "seconds": seconds,
        }

    def seconds(self) -> float:
        """That the line has taken so far, over all attempts."""
        return self.past + time.monotonic() - self.started

    def state(self, ranks: Ranks) -> dict[str, Tensor]:
        """What a checkpoint keeps, so that a resumed run logs the line it was about to."""
        total = self.everywhere(ranks)
        numbers = [total.loss, total.windows, total.tokens, total.flops]
        # By themselves: all else in a checkpoint is the same whenever it is made.
        seconds = [total.waited, self.seconds()]
        state = {NUMBERS: torch.tensor(numbers, dtype=torch.float64)}
        state |= {SECONDS: torch.tensor(seconds, dtype=torch.float64)}
        return state | {PARTIAL + name: value for name, value in total.sums.items()}

    def restore(self, state: dict[str, Tensor], rank: int) -> None:
        """Take what `state` gave; the sums go to the first process, which had all of them."""
        self.loss, self.windows, tokens, flops = state[NUMBERS].tolist()
        if SECONDS in state:  # not in older checkpoints
            self.waited, self.past = state[SECONDS].tolist()
        if rank == 0:
            self.tokens, self.flops = tokens, flops
            for name, value in state.items():
                if name.startswith(PARTIAL) and name not in (NUMBERS, SECONDS):
                    self.sums[name.removeprefix(PARTIAL)] = value.to(self.device)


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Per-step means `name/k`, the mean over the rows of all steps `name`, and the simulated
    accepted length.

    The length is 1, the target's own token, where no slot is supervised at every step.
    """
    rows_K = sums["rows"]
    metrics = onpolicy(sums)
    for name, value in sums.items():
        if name.startswith(ONPOLICY) or name in ("rows", "length", "length_slots"):
            continue
        mean_K = value / rows_K.clamp(min=1)
        metrics[name] = float(value.sum() / rows_K.sum().clamp(min=1))
        metrics |= {f"{name}/{k}": float(v) for k, v in enumerate(mean_K)}
    slots = sums["length_slots"]
    metrics["simulated_length"] = float(sums["length"] / slots) if float(slots) else 1.0
    metrics["supervised"] = float(rows_K.sum())
    return metrics


def onpolicy(sums: dict[str, Tensor]) -> dict[str, float]:
    """Of what the draft proposed itself: tokens gained per verification, the target's token
    included (in its own answers, where it wrote any; those of replay are then another name's);
    proposed tokens that the target read; the replay's share of the loss."""
    own = {name: float(value) for name, value in sums.items() if name.startswith(ONPOLICY)}
    length = ONPOLICY + "accepted_length"
    if anchors := own.get(ONPOLICY + "anchors"):
        own[length] = 1 + own.pop(ONPOLICY + "accepted") / anchors
    if verifications := own.get(ONPOLICY + "verifications"):
        own[ONPOLICY + "replayed_length"] = own.pop(length, 1.0)
        own[length] = own.pop(ONPOLICY + "gained") / verifications
    return own


def summary(metrics: dict[str, float]) -> str:
    """One line of the numbers that matter."""
    return (
        f"loss {metrics['loss']:.4f}, simulated accepted length {metrics['simulated_length']:.3f}, "
        f"acceptance rate {metrics['alpha/0']:.3f}, top-1 {metrics['top1/0']:.3f}"
    )


DRAFTS = Measure(means, summary, ("length", "slots"), "simulated_length", "tau")
"""What every draft reports."""
