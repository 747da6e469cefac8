"""States that workers compute: a trainer asks for what its plan says, and takes it in that order.

There is no controller and no queue. A trainer knows the conversations that it will use as far ahead
as it likes; it sends them to the worker that has the least to do for it, one call per forward, and
the store holds what comes back until it is taken. Nothing is held in workers, so that the death of
one loses nothing that cannot be asked for again: states are a pure function of tokens.

Shape suffixes: T tokens, H hidden, A auxiliary states.
"""

import logging
import os
import time
from dataclasses import dataclass
from secrets import token_hex
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specforge_exp.data.tokens import TokenSet
from specforge_exp.errors import InputError
from specforge_exp.inference.cluster import RESUME, Fleet, join_fleet, reason, refusal
from specforge_exp.inference.states import crossed, unpacked
from specforge_exp.inference.store import LostStates, store_at
from specforge_exp.target import Ends, make_ends
from specforge_exp.training.batches import Batch, moved
from specforge_exp.training.features import Features, States, Take, joined
from specforge_exp.training.ranks import Ranks

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Times that a conversation is asked for, besides Ray's own repeats."""
GLANCE = 2.0
"""Seconds between looks at whether the cluster is still there."""
PATIENCE = 600.0
"""Seconds without any answer after which a training gives up."""


@dataclass
class Call:
    """A forward's conversations on their way."""

    key: str
    numbers: list[int]
    worker: int
    size: int
    answers: list[Any]


class Stream:
    """One trainer's side of a fleet.

    Args:
        fleet: the workers.
        device: where the states go.
    """

    def __init__(self, fleet: Fleet, device: torch.device) -> None:
        self.fleet, self.device = fleet, device
        self.ray, self.workers = join_fleet(fleet)
        self.tokens: dict[int, TokenSet] = {}
        self.lock = Lock()  # one thread asks, others take
        self.store = store_at(fleet.store)
        mine = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "RANK")]
        self.name = "/".join([fleet.namespace, *mine, token_hex(4)])
        self.load = [0] * len(self.workers)
        self.asked = self.taken = self.again = 0
        self.busy = self.busy_before = 0.0
        self.ends = self.fetch_ends()

    def fetch_ends(self) -> Ends:
        """What a worker tells of the target, for the draft and its losses."""

        def last_layers(number: int) -> list[dict[str, Tensor]]:
            return [
                crossed(weights, self.device)
                for weights in self.wait(self.of_target("last_layers", number))
            ]

        parts = self.wait(self.of_target("ends"))
        return make_ends(parts, crossed(parts["weights"], self.device), last_layers)

    def of_target(self, what: str, *args: Any) -> Any:
        """Ask a worker about the target itself."""
        return getattr(self.workers[0], what).remote(*args)

    def features(self, splits: dict[int, TokenSet]) -> Features:
        """States of these conversations, training (1) and held-out (-1)."""
        self.tokens = splits
        width = (len(self.ends.aux_layers) + 1) * self.ends.text.hidden_size
        size = width * self.ends.model.dtype.itemsize
        self.account = Features(self.ask, self.fleet.ahead, size, self.measured, self.summary)
        return self.account

    def ids(self, number: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """A conversation's tokens; held-out ones count down from -1."""
        ids_T = self.tokens[1][number][0] if number >= 0 else self.tokens[-1][-1 - number][0]
        return ids_T.numpy().astype(np.int32)

    def ask(self, batches: list[Batch]) -> Take:
        """One call for each batch."""
        calls = [self.send(batch.numbers) for batch in batches]
        return lambda: [self.take(call) for call in calls]

    def send(self, numbers: list[int]) -> Call:
        """Ask the worker that has the least to do for this trainer."""
        ids = [self.ids(number) for number in numbers]
        size = sum(map(len, ids))
        with self.lock:
            worker = min(range(len(self.load)), key=lambda i: (self.load[i], i))
            self.load[worker] += size
            key = f"{self.name}/{self.asked}"
            self.asked += len(numbers)
        method = self.workers[worker].states.options(num_returns=len(ids) + 1)
        return Call(key, numbers, worker, size, method.remote(ids, key))

    def take(self, call: Call) -> tuple[Tensor, Tensor]:
        """The states of a forward, asked for again when they are lost.

        Raises:
            InputError: they cannot be had, or the cluster is gone.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                *held, seconds = self.wait(call.answers)
                states = self.store.take(call.key, held)
                break
            except (self.ray.exceptions.RayError, LostStates) as error:
                self.fleet.check()
                if attempt == ATTEMPTS:
                    raise self.failed(call, error) from None
                log.warning("train: asking again for states: %s", reason(error))
                self.store.forget(call.key, len(call.numbers))
                self.settle(call)
                call.__dict__ |= vars(self.send(call.numbers))
                with self.lock:
                    self.again += len(call.numbers)
        hidden, dtype = self.ends.text.hidden_size, self.ends.model.dtype
        parts: States = [unpacked(data, dtype, hidden) for data in states]
        call.answers.clear()  # the store forgets them
        self.settle(call)
        with self.lock:
            self.taken += len(parts)
            self.busy += seconds
        aux_TA, last_TH = joined(parts)
        if len(last_TH) != call.size:
            raise InputError(f"a worker gave states of {len(last_TH)} tokens for {call.size}")
        return moved(aux_TA, self.device), moved(last_TH, self.device)

    def settle(self, call: Call) -> None:
        """The worker has that much less to do."""
        with self.lock:
            self.load[call.worker] -= call.size

    def wait(self, answers: Any) -> Any:
        """What was asked for; looks now and then whether there is anybody to answer.

        Raises:
            InputError: the cluster is gone, or nobody has answered for long.
        """
        began = time.monotonic()
        while True:
            try:
                return self.ray.get(answers, timeout=GLANCE)
            except self.ray.exceptions.GetTimeoutError:
                self.fleet.check()
                if time.monotonic() - began > PATIENCE:
                    raise InputError(
                        f"no worker of {self.fleet.address} has answered for {PATIENCE:.0f} s: "
                        f"are its machines there? Else {RESUME}"
                    ) from None

    def failed(self, call: Call, error: Any) -> InputError:
        """Names the conversations that could not be had."""
        names = [f"training {n}" if n >= 0 else f"held-out {-1 - n}" for n in call.numbers[:20]]
        where = f"conversations {', '.join(names)} (counted from 0)"
        return refusal(error, f"the target failed {ATTEMPTS} times on {where}")

    def measured(self, seconds: float, ranks: Ranks) -> dict[str, float]:
        """worker_busy: the share of the time in which workers computed what was taken;
        states_held_mb: the most asked for and not used, by all trainers."""
        busy, self.busy_before = self.busy - self.busy_before, self.busy
        busy, most = map(sum, zip(*ranks.gather((busy, self.account.most)), strict=True))
        return {
            "worker_busy": busy / (seconds * len(self.workers)),
            "states_held_mb": most / 2**20,
        }

    def summary(self, ranks: Ranks) -> str:
        """What was asked for and taken, by all trainers of this attempt."""
        rows = ranks.gather((self.asked, self.taken, self.again, self.account.most))
        asked, taken, again, most = map(sum, zip(*rows, strict=True))
        return (
            f"states of {asked} conversations asked for, {taken} taken, {again} asked for again, "
            f"at most {most / 2**20:.1f} MB held"
        )
