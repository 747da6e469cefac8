"""States that workers compute: in the plan's order, within the buffer, asked for again if lost."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import conversation_set, make_config

from specforge_exp import paths
from specforge_exp.config import Config, TargetConfig, TrainerConfig
from specforge_exp.errors import InputError
from specforge_exp.stages.prep import prep
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.train import fleet_of, read_tokens, split_of, train, train_on
from specforge_exp.target import Target, load_target
from specforge_exp.training.batches import make_batch
from specforge_exp.training.features import computed, in_order
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.streamed import Stream

CPU = torch.device("cpu")
WIDTH = 4 * 128 * 4
"""Bytes of one token's states."""
NEEDS_RAY = pytest.mark.skipif(
    find_spec("ray") is None or sys.platform != "linux",
    reason="Ray is not installed: pip install -e '.[ray]'",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Twelve conversations of the tiny target; workers with room for two windows."""
    cfg = make_config(tmp_path_factory.mktemp("streamed"))
    cfg.preprocess.source, cfg.threads = "prep", 1
    prep(cfg)
    preprocess(cfg)
    cfg.trainer = TrainerConfig(batch_size=2, log_every=1, eval_every=4)
    cfg.target = TargetConfig(placement="ray", buffer_gb=0.003)
    return cfg


@pytest.mark.ray
@NEEDS_RAY
def test_one_trainer_and_one_worker(run: Config) -> None:
    """A whole training: the losses of a process that has the target, to the bit."""
    from test_resume import lines, losses

    short = replace(run, max_steps=6)
    train(replace(short, run_name="live", target=TargetConfig()))
    train(replace(short, run_name="workers"))
    assert losses(run, "workers") == losses(run, "live") and losses(run, "live")
    assert sum(line.get("worker_busy", 0) for line in lines(run, "workers")) > 0


@pytest.fixture(scope="module")
def stream(run: Config) -> Iterator[Stream]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_debug_dump_period_milliseconds", "50")  # for `stored`
        with fleet_of(run, split_of(run)) as fleet:
            yield Stream(fleet, CPU)


def stored(stream: Stream) -> int:
    """Bytes that the store holds, as its own process says."""
    folder = Path(stream.ray._private.worker._global_node.get_session_dir_path())
    text = (folder / "logs" / "debug_state.txt").read_text()
    found = re.search(r"pinned objects size: (\d+)", text)
    return int(found[1]) if found else 0


@pytest.mark.ray
@NEEDS_RAY
@pytest.mark.slow
def test_order_bound_and_loss(run: Config, stream: Stream, tiny_target: Target) -> None:
    """What is taken is what a process with the target computes, in the order of asking; states
    that the store has lost are asked for again; a slow trainer leaves the worker idle."""
    from ray_runs import processes

    _, splits = read_tokens(paths.tokens_dir(run))
    source = stream.features({1: splits.train, -1: splits.eval})
    live, most = computed(tiny_target.states), 0

    def windows() -> Iterator[tuple[list[int], list[Any]]]:
        for first in range(0, 12, 2):
            numbers = [first, first + 1]
            yield numbers, [make_batch(splits.train, numbers, CPU, 1)]

    def epoch(seconds: float) -> float:
        nonlocal most
        began, order = time.monotonic(), []
        for numbers, states in in_order(source, windows()):
            order += numbers
            expected = live.ask([make_batch(splits.train, numbers, CPU, 1)])()
            for own, other in zip(states[0], expected[0], strict=True):
                assert own.equal(other)
            time.sleep(seconds)  # a trainer that takes its time
            most = max(most, stored(stream))
        assert order == list(range(12))
        return source.measured(time.monotonic() - began, Ranks())["worker_busy"]

    slow = epoch(0.5)  # beside one in which this process is not held up
    assert slow > 0 and any(epoch(0.0) > slow for _ in range(5))
    longest = max(splits.train.lengths[i] + splits.train.lengths[i + 1] for i in range(0, 12, 2))
    bound = stream.fleet.ahead + longest * WIDTH
    assert source.held == 0 and source.most <= bound
    assert 0 < most <= bound + 12 * 1024  # what each object has beside its bytes
    [worker] = processes(os.getpid(), "^ray::TargetWorker")
    os.kill(worker, signal.SIGSTOP)
    calls = [stream.send([number]) for number in [*range(12)] * 3]
    stream.ray.cancel(calls[-1].answers[0])  # while the worker has the others to do
    os.kill(worker, signal.SIGCONT)
    sizes = [len(stream.take(call)[0]) for call in calls]
    assert sizes == [*splits.train.lengths] * 3
    assert stream.again == 1 and stream.asked == stream.taken + stream.again


@pytest.mark.ray
@NEEDS_RAY
@pytest.mark.slow
def test_workers_alone(run: Config, stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    """All of the first three steps is asked for and taken; nothing is trained or written."""
    alone = replace(run, run_name="alone", max_steps=3, target=replace(run.target, alone="workers"))
    taken = stream.taken
    stream.measured(1.0, Ranks())  # forgets what others were busy with
    with caplog.at_level("INFO"):
        record = train_on(alone, CPU, Ranks(), stream)
    assert stream.taken - taken == 6 and str(record["evaluation"]["simulated_length"]) == "nan"
    found = re.search(r"workers: .* tokens_per_s (\S+), .* worker_busy (\S+), .*kept", caplog.text)
    assert found and 0 < float(found[2]) < 2
    assert not paths.run_dir(alone).exists()


@pytest.mark.ray
@NEEDS_RAY
@pytest.mark.slow
def test_a_conversation_that_always_fails_is_named(stream: Stream) -> None:
    stream.features({1: conversation_set([[1] * 4, [1] * 4])})
    stream.tokens[1].shards[0].ids[6] = 99_999  # the target has no such token
    with pytest.raises(InputError, match=r"failed 5 times on conversations training 1 \(counted"):
        stream.take(stream.send([1]))


def test_a_buffer_that_is_too_small_is_refused(run: Config) -> None:
    small = replace(run, target=TargetConfig(placement="ray", buffer_gb=1e-4))
    with pytest.raises(InputError, match=r"two of them must fit: target.buffer_gb=0\.\d+ or more"):
        split_of(small)
    served = replace(run, target=TargetConfig(placement="ray", engine="vllm"))
    with pytest.raises(InputError, match=r"needs vLLM.*target\.python="):
        split_of(served)
    split = split_of(run)
    assert split.token_bytes == WIDTH and split.buffer <= 3e6 and split.store > split.buffer
    apart = split_of(replace(run, target=replace(run.target, store="mooncake")))
    assert split.segment == 0 and apart.segment >= 1.3 * split.buffer
    assert "of a process of Mooncake's" in apart.lines()[1]


def test_the_ends_of_a_target_are_enough_for_a_draft(run: Config) -> None:
    """A draft made of what a worker tells is the one that the whole target gives."""
    from specforge_exp.drafts.eagle3 import Eagle3
    from specforge_exp.inference.states import crossed
    from specforge_exp.inference.worker import TargetWorker
    from specforge_exp.target import make_ends

    mapping, _ = read_tokens(paths.tokens_dir(run))
    for start in ("target", "random"):
        draft = replace(run.draft, start=start)
        worker = TargetWorker(replace(run, draft=draft), 1, "")
        assert worker.begin()["tokens_per_s"] > 0
        parts = worker.ends()
        ends = make_ends(
            parts,
            crossed(parts["weights"], CPU),
            lambda n, worker=worker: [crossed(w, CPU) for w in worker.last_layers(n)],
        )
        whole = load_target(run.model, CPU, feeds=partial(Eagle3.target_layers, draft))
        one, two = (Eagle3.new(target, draft, mapping, 0) for target in (ends, whole))
        pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
        assert all(a == b and x.equal(y) for (a, x), (b, y) in pairs)
        assert ends.parameters == whole.parameters and len(ends.layers) == len(whole.layers)
        assert ends.head.scale == whole.head.scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "ray", "cache": "disk"}, "needs target.cache=none or memory"),
        ({"placement": "ray", "shard": True}, "exclude each other"),
        ({"placement": "ray", "tp_size": 2}, "target.tp_size needs .* target.engine=vllm"),
        ({"placement": "ray", "python": "p"}, "target.python needs .* target.engine=vllm"),
        ({"engine": "vllm"}, "target.engine=vllm needs target.placement=ray"),
        ({"placement": "ray", "engine": "sglang"}, "target.engine=sglang .*transformers, vllm"),
        (
            {"placement": "ray", "store": "redis"},
            "target.store=redis is not valid; .*mooncake",
        ),
        ({"store": "mooncake"}, "target.store needs target.placement=ray"),
        (
            {"placement": "ray", "store": "mooncake", "share": "sweep"},
            "target.share=sweep needs target.store=ray",
        ),
        ({"workers": 2}, "target.workers needs target.placement=ray"),
        ({"profile": [1, 2]}, "target.profile needs target.placement=ray"),
        ({"placement": "ray", "profile": [1]}, r"target.profile=\[1\] is not \[start, calls\]"),
        ({"placement": "ray", "profile": [1, 1], "engine": "vllm"}, "profiler of its own"),
        ({"dry_run": True}, "target.dry_run needs target.placement=ray"),
        ({"buffer_gb": 0.0}, "target.buffer_gb=0.0 must be above 0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TargetConfig(**options)
