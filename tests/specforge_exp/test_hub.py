"""Runs that share states: each gets what it asks for, nobody waits for ever, nothing runs twice."""

import asyncio
import os
import random
from collections import deque
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specforge_exp.config import Config, TargetConfig, check_job
from specforge_exp.errors import InputError
from specforge_exp.inference import FLEET, sweep
from specforge_exp.inference.hub import Hub, Who
from specforge_exp.inference.sweep import fleet_of_sweep
from specforge_exp.inputs import check_trials

SIZE = 10
"""Tokens of a forward, each of which has one byte of states."""


class Worker:
    """Answers at once with the numbers that it was asked about."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.states = SimpleNamespace(options=lambda num_returns: self)

    def remote(self, ids: list[np.ndarray[Any, Any]], key: str) -> list[int]:
        answers = [int(x[0]) for x in ids]
        self.asked += answers
        return answers


def forward(number: int) -> list[bytes]:
    return [np.full(SIZE, number, np.int32).tobytes()]


def hub_of(places: int, buffer: int = 4, patience: float = 60.0) -> tuple[Hub, Worker]:
    worker = Worker()
    return Hub([worker], buffer * SIZE, 1, places, patience), worker


def who(run: str, pid: int = 0) -> Who:
    return run, "plan", 1, pid or hash(run)


async def pause(chance: random.Random, most: int = 4) -> None:
    for _ in range(chance.randrange(most)):
        await asyncio.sleep(0)


async def take(hub: Hub, me: Who, number: int) -> Any:
    while (answer := await hub.take(me, number)) is None:
        pass
    await hub.took(me, number)
    return answer[0][0]


async def train(hub: Hub, me: Who, plan: list[int], chance: random.Random) -> list[int]:
    """Asks ahead, and in the middle, with windows on their way, takes some that it asks for last:
    held-out rounds."""
    got, ahead, number, middle = [], deque[int](), 0, len(plan) // 2
    for at, name in enumerate(plan):
        await hub.ask(me, number, forward(name))
        ahead.append(number)
        number += 1
        if at == middle:
            for held_out in range(900, 905):
                await hub.ask(me, number, forward(held_out))
                assert await take(hub, me, number) == held_out
                number += 1
                await pause(chance)
        while len(ahead) > 3 or (at == len(plan) - 1 and ahead):
            got.append(await take(hub, me, ahead.popleft()))
            await pause(chance, chance.choice([2, 9]))
    return got


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, 30)

    return asyncio.run(bounded())


@pytest.mark.parametrize("seed", range(25))
def test_one_forward_for_all_whoever_dies(seed: int) -> None:
    """Runs of all speeds: one dies, one comes late. Nobody waits for them, and the target runs
    once for those that share."""
    chance = random.Random(seed)
    plan = [*range(30)]
    runs = [who(f"run{i}") for i in range(5)]
    hub, worker = hub_of(len(runs))
    done: set[str] = set()

    async def going(me: Who, plan: list[int]) -> None:
        await pause(chance, 20)
        assert await train(hub, me, plan, chance) == plan
        done.add(me[0])
        await hub.look({run[0] for run in runs} - done, [me])

    async def sweep() -> None:
        await hub.look([run[0] for run in runs], [])
        tasks = [asyncio.create_task(going(me, plan)) for me in runs[:4]]
        victim = asyncio.create_task(going(runs[4], plan))
        while hub.members.keys() != {*runs} and not done:
            await asyncio.sleep(0)
        await pause(chance, 200)
        if victim.cancel():
            await asyncio.gather(victim, return_exceptions=True)
            await hub.look([], [runs[4]])
        late = asyncio.create_task(going(who("late"), plan))
        watched = asyncio.create_task(watch())
        await asyncio.gather(*tasks, late)
        assert watched.cancel()  # what it asserts it has not found wrong

    async def watch() -> None:
        while True:
            assert sum(s.held for s in hub.streams) <= hub.buffer + SIZE * len(hub.streams)
            await asyncio.sleep(0)

    run(sweep())
    assert hub.streams == []
    counts = [worker.asked.count(n) for n in plan]
    assert max(counts) <= 2  # the late one's too


def test_starters_are_waited_for_as_far_as_the_buffer_goes() -> None:
    """What comes within the buffer, or while nothing is let go of, costs nothing more."""

    async def sweep() -> None:
        hub, worker = hub_of(places=2)
        one, two, three = who("one"), who("two"), who("three")
        await hub.look(["one", "two", "three"], [])
        chance = random.Random(0)
        first = asyncio.create_task(train(hub, one, [*range(9)], chance))
        for _ in range(200):
            await asyncio.sleep(0)
        assert worker.asked == [0, 1, 2, 3] and not first.done()
        second = asyncio.create_task(train(hub, two, [*range(9)], chance))
        assert [await first, await second] == [[*range(9)]] * 2
        assert sorted(worker.asked) == [*range(9), *range(900, 905)]
        await hub.look(["three"], [one, two])  # the next wave has a stream of its own
        assert await train(hub, three, [*range(9)], chance) == [*range(9)]
        assert await hub.summary() == (3, 28, 42)

    run(sweep())


@pytest.mark.parametrize("seed", range(5))
def test_calls_may_overtake_each_other(seed: int) -> None:
    """An actor that awaits begins them in any order: what is shared stays shared."""
    chance, plan = random.Random(seed), [*range(9)]

    async def sweep() -> None:
        hub, worker = hub_of(places=2, buffer=9)
        runs = [who("one"), who("two")]
        await hub.look([run[0] for run in runs], [])
        calls = [hub.ask(run, number, forward(number)) for run in runs for number in plan]
        takes = [take(hub, run, number) for run in runs for number in plan]
        begun = [*calls, *takes]
        for at in chance.sample(range(len(begun)), len(begun)):
            begun[at] = asyncio.ensure_future(begun[at])
        got = [await task for task in begun[len(calls) :]]
        assert got == plan * 2 and sorted(worker.asked) == plan and not any(hub.early.values())

    run(sweep())


def test_who_does_nothing_is_left_behind() -> None:
    """Also before it has come. What it comes for later it gets."""

    async def sweep() -> None:
        hub, worker = hub_of(places=2, patience=0.05)
        stopped, going = who("stopped"), who("going")
        await hub.look(["stopped", "going", "never"], [])
        await hub.ask(stopped, 0, forward(0))
        await hub.ask(stopped, 1, forward(1))
        task = asyncio.create_task(train(hub, going, [*range(9)], random.Random(0)))
        while not task.done():
            await asyncio.sleep(0.01)
            await hub.look(["stopped", "going", "never"], [])
        assert await task == [*range(9)]
        assert await take(hub, stopped, 0) == 0
        answer = await hub.take(stopped, 1)
        assert answer is not None and answer[0] == [1]
        assert worker.asked.count(0) == worker.asked.count(1) == 2

    run(sweep())


def test_two_workers_do_as_much_and_what_they_did_is_counted() -> None:
    """A forward is of several conversations; what is asked about the target is kept by question."""

    async def sweep() -> None:
        workers, questions = [Worker(), Worker()], list[int]()
        workers[0].last_layers = SimpleNamespace(remote=lambda n: questions.append(n) or [n] * n)  # type: ignore[attr-defined, func-returns-value]
        hub = Hub(workers, 99 * SIZE, 1, 2, 60.0)
        await hub.look(["one", "two"], [])
        for layers in (1, 3, 1):
            assert await hub.once("last_layers", layers) == [[layers] * layers]
        assert questions == [1, 3]
        for me in (who("one"), who("two")):
            for number in range(4):
                await hub.ask(me, number, forward(number) + forward(100 + number))
        assert [await take(hub, me, n) for me in (who("one"), who("two")) for n in range(4)] == [
            *range(4), *range(4)
        ]  # fmt: skip
        assert [len(worker.asked) for worker in workers] == [4, 4]
        assert await hub.summary() == (2, 8, 16)

    run(sweep())


def test_what_each_run_is_told() -> None:
    async def sweep() -> None:
        hub, _ = hub_of(places=3)
        names = [who("one"), who("two"), who("three")]
        await hub.look([name[0] for name in names], [])
        for name in names:
            await hub.ask(name, 0, forward(0))
        notes = [answer[1] for name in names if (answer := await hub.take(name, 0))]
        assert notes == ["shares its states with 2 other runs"] * 3
        await hub.ask(names[0], 1, forward(1))
        await hub.ask(names[1], 1, forward(7))
        told = await hub.take(names[1], 1)
        assert told is not None and told[0] == [7]
        assert told[1].startswith("has its states alone: it asks for other states than the runs")
        again = who("one", pid=5)  # it was killed, and comes back
        await hub.look([], [names[0]])
        await hub.ask(again, 0, forward(4))
        told = await hub.take(again, 0)
        assert told == ([4], "has its states alone")

    run(sweep())


SHARING = {"placement": "ray", "share": "sweep"}


def refusal(*targets: dict[str, Any], places: int | None = 4, **more: Any) -> str:
    """Why runs with these options of the target, and others, cannot share a fleet."""
    from test_inputs import job

    jobs = [job(Path("/nowhere"), target=target, **more) for target in targets]
    with (
        pytest.raises(InputError) as error,
        fleet_of_sweep("train", jobs, Path("/nowhere"), places),  # type: ignore[arg-type]
    ):
        pass
    return str(error.value)


def test_who_cannot_share(tmp_path: Path, cfg: Config) -> None:
    """Before anything is started."""
    from test_inputs import job

    alone = {"placement": "ray"}
    assert "for all runs of a sweep or for none" in refusal(SHARING, alone)
    for places in (None, 1):
        assert "hydra.sweeper.n_jobs=2, or as many as fit" in refusal(
            SHARING, SHARING, places=places
        )
    for nobody in (("bench", SHARING), ("train", alone), ("train", SHARING | {"dry_run": True})):
        stage, options = nobody
        with fleet_of_sweep(stage, [job(tmp_path, target=options)], tmp_path, None):  # type: ignore[list-item]
            assert FLEET not in os.environ
    with pytest.raises(InputError, match=r"for grids: trials of a study begin one after the other"):
        check_trials("train", [job(tmp_path, target=SHARING)])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"each job has a container of its own: target.share=none"):
        resources = {"image": {"extras": ["ray"]}, "volumes": {}}
        check_job(job(tmp_path, target=SHARING, resources=resources))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"target.share needs target.placement=ray"):
        TargetConfig(share="sweep")


def test_a_cluster_that_is_there_keeps_its_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_inputs import job

    process = SimpleNamespace(start=lambda: None, join=lambda: None)
    pipe = SimpleNamespace(close=lambda: None)
    context = SimpleNamespace(Pipe=lambda: (pipe, pipe), Process=lambda **words: process)
    monkeypatch.setattr(sweep, "get_context", lambda kind: context)
    monkeypatch.setattr(sweep, "answered", lambda pipe: "{}")
    monkeypatch.delenv(sweep.TOKEN, raising=False)
    jobs: Any = [job(tmp_path, target=SHARING)] * 2
    with fleet_of_sweep("train", jobs, tmp_path, 2):
        assert len(os.environ[sweep.TOKEN]) == 64
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with fleet_of_sweep("train", jobs, tmp_path, 2):
        assert sweep.TOKEN not in os.environ


def test_a_run_alone_cannot_share(cfg: Config, tokens: Path) -> None:
    from specforge_exp.stages.train import train

    cfg.target = TargetConfig(**SHARING)
    with pytest.raises(InputError, match=r"a run alone: python \S*train\.py target\.share=none"):
        train(cfg)


def test_one_fleet_has_one_target(cfg: Config) -> None:
    from specforge_exp.inference.shared import plan_of, refuse_unlike

    cfg.target = TargetConfig(**SHARING)
    other = replace(cfg, run_name="other", lr=2.0, seed=3, loss=replace(cfg.loss, lambda_rkl=1.0))
    refuse_unlike([cfg, other])
    assert plan_of(cfg) != plan_of(other) and plan_of(cfg) == plan_of(replace(other, seed=cfg.seed))
    layers = replace(other, model=replace(cfg.model, aux_layers=[0, 1, 2]))
    with pytest.raises(InputError, match=r"other \[0, 1, 2\]; give each a command of its own"):
        refuse_unlike([cfg, layers])
