"""One fleet for the runs of a sweep: the process that has it, and a trainer's side of it.

The process tells the hub which runs are to come, by the sweep's record, and which trainers are no
more. A trainer tells the hub what it is going to take and takes it from there; without the hub it
asks the workers for one forward after the other, so that no more is held than the store has room
for.

Shape suffixes: T tokens, H hidden, A auxiliary states.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.inference.cluster import Fleet, fleet_of, given, join_fleet, reason, running
from specforge_exp.inference.hub import Hub
from specforge_exp.inference.split import Split, split_of
from specforge_exp.paths import tokens_dir
from specforge_exp.target import check_gpus, take_what_is_there
from specforge_exp.target.loading import fed_by
from specforge_exp.training.batches import Batch
from specforge_exp.training.features import Take
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.streamed import Call, Stream

log = logging.getLogger(__name__)

HUB = "hub"
"""The actor's name."""
GLANCE = 0.5
"""Seconds between looks at the sweep's record and at trainers."""


def keep_fleet(pipe: Connection, configs: list[Config], folder: Path, places: int) -> None:
    """Have a fleet, and tell the other end of a pipe of it, until that closes.

    It closes when the sweep's process and its jobs have ended, however they do.

    Args:
        pipe: to the sweep's process.
        configs: of the runs.
        folder: of the sweep's record.
        places: runs at a time.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    configs = [take_what_is_there(cfg) for cfg in configs]
    cfg, told = configs[0], False
    try:
        check_gpus(cfg, "train", int(cfg.trainer.gpus))
        refuse_unlike(configs)
        split = split_for(configs, places)
        with fleet_of(cfg, split) as fleet:
            ray, workers = join_fleet(fleet)
            hub = ray.remote(Hub).options(name=HUB, num_cpus=0).remote(
                workers, split.buffer, split.token_bytes, places, cfg.target.share_patience
            )  # fmt: skip
            runs = {cfg.run_name for cfg in configs}
            pipe.send(json.dumps(asdict(fleet)))
            told = True
            try:
                watch(ray, hub, pipe, fleet, lambda: to_come(folder) & runs)
                log.info("train: %s", account(*ray.get(hub.summary.remote())))
            except ray.exceptions.RayError as error:
                fleet.check()
                log.warning("train: runs share nothing any more: %s", reason(error))
                wait([pipe])
    except InputError as error:
        if told:
            log.error("error: %s", error)
        else:
            pipe.send(error)


def watch(
    ray: Any, hub: Any, pipe: Connection, fleet: Fleet, coming: Callable[[], set[str]]
) -> None:
    """Tell the hub which runs are to come and which trainers are gone, until the pipe closes.

    Raises:
        InputError: the fleet has ended.
    """
    members: list[Any] = []
    while not pipe.poll(GLANCE):
        fleet.check()
        dead = [who for who in members if not running(who[-1])]
        members = ray.get(hub.look.remote(coming(), dead))


def to_come(folder: Path) -> set[str]:
    """Names of the runs of a sweep that have not ended."""
    runs = json.loads((folder / "sweep.json").read_text())["runs"]
    left = [run for run in runs if run["status"] in ("planned", "running")]
    return {run["record"].get("run_name", run["name"]) for run in left}


def account(runs: int, computed: int, used: int) -> str:
    """What the runs of a fleet have used, and what the target did for it."""
    times = f": {used / computed:.2f} uses of each forward" if computed else ""
    return (
        f"one fleet for {runs} runs: the target ran on {computed} conversations, the runs used "
        f"the states of {used}{times}"
    )


def refuse_unlike(configs: list[Config]) -> None:
    """Refuse runs that one fleet cannot serve.

    Raises:
        InputError: names what they differ in.
    """

    def wanted(cfg: Config) -> dict[str, Any]:
        parts = {"model": asdict(cfg.model), "target": asdict(cfg.target)}
        options = {f"{part}.{k}": v for part, node in parts.items() for k, v in node.items()}
        options |= {"device": cfg.device, "threads": cfg.threads, "engine.name": cfg.bench_engine}
        options |= {"trainer.gpus": cfg.trainer.gpus}
        return options | {"model.aux_layers": fed_by(cfg)}

    first = wanted(configs[0])
    for cfg in configs[1:]:
        for key, value in wanted(cfg).items():
            if value != first[key]:
                raise InputError(
                    f"target.share=sweep: one fleet runs one target, but {configs[0].run_name} has "
                    f"{key}={first[key]} and {cfg.run_name} {value}; give each a command of its own"
                )


def split_for(configs: list[Config], places: int) -> Split:
    """The split with the largest store that one of the runs needs, for so many at a time."""
    unlike = {plan_of(cfg): cfg for cfg in configs}.values()
    return max((split_of(cfg, runs=places) for cfg in unlike), key=lambda split: split.store)


def plan_of(cfg: Config) -> tuple[Any, ...]:
    """What decides which conversations a run takes in which order."""
    names = ("batch_size", "accumulate", "pack_tokens", "eval_every")
    options = [vars(cfg.trainer)[name] for name in names]
    return str(tokens_dir(cfg)), cfg.seed, cfg.epochs, cfg.max_steps, *options


@contextmanager
def joined(cfg: Config) -> Iterator[Fleet]:
    """The workers that a sweep has for its runs, for the trainers that this process starts."""
    fleet = given()
    try:
        yield fleet
    except InputError:
        fleet.check()  # as in `fleet_of`
        raise


class SharedStream(Stream):
    """One trainer's side of a fleet that other runs have too.

    Args:
        fleet: the workers.
        device: where the states go.
        cfg: the run's.
        ranks: this trainer among those of its run.
    """

    def __init__(self, fleet: Fleet, device: torch.device, cfg: Config, ranks: Ranks) -> None:
        self.who = cfg.run_name, f"{plan_of(cfg)} {ranks}", ranks.world, os.getpid()
        self.forwards = 0
        self.hub: Any = None
        super().__init__(fleet, device)

    def of_target(self, what: str, *args: Any) -> Any:
        """As `Stream`, but what one run has asked for all have."""
        try:
            if not self.forwards:  # later it would miss the first ones
                self.hub = self.hub or self.ray.get_actor(HUB, self.fleet.namespace)
            return self.wait(self.hub.once.remote(what, *args))[0]
        except (ValueError, self.ray.exceptions.RayError) as error:
            self.lose(error)
            return super().of_target(what, *args)

    def ask(self, batches: list[Batch]) -> Take:
        """Tell the hub what is going to be taken, in the order of the plan."""
        calls = [self.announce(batch.numbers) for batch in batches]
        return lambda: [self.take_shared(*call) for call in calls]

    def announce(self, numbers: list[int]) -> tuple[int, list[int]]:
        """A forward's number in this trainer's order, and its conversations."""
        forward = self.forwards
        self.forwards += 1
        with self.lock:
            self.asked += len(numbers)
        if self.hub:
            self.hub.ask.remote(self.who, forward, [self.ids(n).tobytes() for n in numbers])
        return forward, numbers

    def take_shared(self, forward: int, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """The states of a forward."""
        states = self.take(self.handed(forward, numbers))
        if self.hub:
            self.hub.took.remote(self.who, forward)
        return states

    def handed(self, forward: int, numbers: list[int]) -> Call:
        """What the hub gives for a forward; a call of this trainer's own when it is no more."""
        try:
            while self.hub:
                if answer := self.wait(self.hub.take.remote(self.who, forward)):
                    answers, note = answer
                    if note:
                        log.info("train: this run %s", note)
                    size = sum(len(self.ids(n)) for n in numbers)
                    with self.lock:
                        self.load[0] += size
                    return Call("", numbers, 0, size, answers)
        except self.ray.exceptions.RayError as error:
            self.lose(error)
        with self.lock:
            self.asked -= len(numbers)
        return super().send(numbers)

    def send(self, numbers: list[int]) -> Call:
        """Ask a worker for this trainer alone, as states are lost."""
        if self.hub:
            self.hub.direct.remote(len(numbers))
        return super().send(numbers)

    def lose(self, error: Exception) -> None:
        """Go on without the hub."""
        self.hub = None
        log.warning("train: this run shares states with no other any more: %s", reason(error))
