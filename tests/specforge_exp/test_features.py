"""Where the target's states come from changes no number."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from conftest import conversation_set
from safetensors.torch import load_file
from test_train import losses
from torch import Tensor

from specforge_exp import paths
from specforge_exp.config import Config, TargetConfig, TrainerConfig
from specforge_exp.errors import InputError
from specforge_exp.lease import lease
from specforge_exp.records import write_record
from specforge_exp.stages.train import train
from specforge_exp.target import Target
from specforge_exp.training.batches import Batch, make_batch
from specforge_exp.training.feature_cache import compared, is_whole, plan, write_shard
from specforge_exp.training.features import (
    Features,
    States,
    Take,
    computed,
    in_order,
    remembered,
)

CPU = torch.device("cpu")


@pytest.fixture
def run(cfg: Config, tokens: Path) -> Config:
    cfg.trainer = TrainerConfig(batch_size=3, log_every=1, eval_every=4)
    cfg.epochs = 3
    return cfg


def cached(run: Config, cache: str, name: str | None = None) -> Config:
    return replace(run, run_name=name or cache, target=TargetConfig(cache=cache))


def test_three_ways_to_the_same_losses(run: Config) -> None:
    """To the bit: computed in every step, kept in memory, read from disk."""
    train(run)
    for cache in ("memory", "disk"):
        train(cached(run, cache))
        assert losses(cached(run, cache)) == losses(run)


def test_the_disk_cache_says_its_size_and_serves_every_loss(
    run: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    run.max_steps = 2
    train(cached(run, "disk"))
    assert "GB for" in caplog.text
    folder = paths.features_dir(run)
    shards = {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
    assert shards

    features = Target.features

    def refuse(target: Target, ids_1T: Tensor, *cache: Any) -> tuple[Tensor, Tensor]:
        assert ids_1T.shape[1] <= 8, "the target ran"  # it is tried on 8 tokens when it loads
        return features(target, ids_1T, *cache)

    monkeypatch.setattr(Target, "features", refuse)
    other = cached(run, "disk", "other")
    other.loss = replace(run.loss, name="rkl", lambda_ce=0.0, lambda_rkl=1.0)
    other.trainer = replace(other.trainer, init=str(paths.run_dir(cached(run, "disk"))))
    train(other)
    assert shards == {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_an_unfinished_cache_goes_on(run: Config) -> None:
    """A shard is taken because it is what was written, of these options; others are made again."""
    run.max_steps = 2
    train(cached(run, "disk"))
    folder = paths.features_dir(run)
    shard = folder / "00000.safetensors"
    before = shard.read_bytes()
    flipped = bytearray(before)
    flipped[-1] ^= 1
    others = [None, before[:-8], bytes(flipped), b"{}"]
    write_shard(folder / "other", load_file(shard), "made of something else")
    others.append((folder / "other").read_bytes())
    (folder / "other").unlink()
    for number, content in enumerate(others):
        (folder / "index.json").unlink()
        shard.write_bytes(content) if content else shard.unlink()
        train(cached(run, "disk", f"again{number}"))
        assert shard.read_bytes() == before, number
        assert (folder / "index.json").exists()
    (folder / "index.json").unlink()
    made = shard.stat().st_mtime_ns
    train(cached(run, "disk", "last"))
    assert shard.stat().st_mtime_ns == made and shard.read_bytes() == before


def test_states_of_any_type_have_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    assert not is_whole(path, "a")
    states = {"aux": torch.ones(1, dtype=torch.bfloat16), "last": torch.zeros(0, 4)}
    write_shard(path, states, "a")
    assert is_whole(path, "a") and not is_whole(path, "b")


def test_runs_of_a_sweep_share_one_cache(run: Config, caplog: pytest.LogCaptureFixture) -> None:
    """While one run makes it another waits, then finds it whole."""
    caplog.set_level(logging.INFO)
    run.max_steps = 2
    folder = paths.features_dir(run)
    folder.mkdir(parents=True)
    held = Event()

    def first() -> bool:
        with lease(folder):
            held.set()
            while "waiting for it" not in caplog.text:
                time.sleep(0.02)
            return (folder / "index.json").exists()

    with ThreadPoolExecutor(1) as other:
        made_meanwhile = other.submit(first)
        assert held.wait(300)
        train(cached(run, "disk", "second"))
        assert not made_meanwhile.result()
    assert (folder / "index.json").exists()


@pytest.mark.parametrize("key", ["max_length", "model.dtype", "the target"])
def test_a_cache_of_something_else_is_refused(run: Config, key: str) -> None:
    run.max_steps = 2
    train(cached(run, "disk"))
    record = paths.features_dir(run) / "made_of.json"
    content = json.loads(record.read_text())
    content["inputs" if key == "the target" else "settings"][key] = "another"
    write_record(record, {name: content[name] for name in ("inputs", "settings")})
    with pytest.raises(InputError, match=rf"{key} (was another|has changed).*target\.cache=none"):
        train(cached(run, "disk", "again"))


def test_a_broken_shard_names_the_remedy(run: Config) -> None:
    run.max_steps = 2
    train(cached(run, "disk"))
    shard = paths.features_dir(run) / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"00000\.safetensors is damaged.*index\.json"):
        train(cached(run, "disk", "again"))


def test_a_full_disk_is_refused_before_writing(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match=r"target\.cache=disk needs .* GB free"):
        train(cached(run, "disk"))
    assert not list(paths.features_dir(run).glob("*.safetensors"))


def test_only_supervised_conversations_are_cached() -> None:
    tokens = conversation_set([[0, 1, 1], [0, 0, 0, 0], [1, 1], [1, 0]])
    assert plan({1: tokens, -1: tokens}, 5) == [
        [(1, 0), (1, 2)], [(1, 3), (-1, 0)], [(-1, 2), (-1, 3)],
    ]  # fmt: skip
    assert compared(torch.tensor([0, 1, 1, 0, 0, 2])).tolist() == [False, *[True] * 3, False, True]


def test_the_target_sees_one_conversation_at_a_time(random_target: Target) -> None:
    """Its states do not depend on the batch, and memory asks once per conversation."""
    calls: list[int] = []

    def states(texts: list[Tensor]) -> States:
        calls.extend(map(len, texts))
        return random_target.states(texts)

    tokens = conversation_set([[1] * 5, [1] * 9, [1] * 7])
    together, alone = (make_batch(tokens, n, CPU, draw=1) for n in ([0, 1, 2], [1]))
    ((aux, last),) = computed(states).ask([together])()
    assert torch.equal(aux[5:14], computed(states).ask([alone])()[0][0])
    calls.clear()
    lookup = remembered(computed(states))
    for _ in range(2):
        (found,) = lookup.ask([together])()
        assert torch.equal(found[0], aux)
        assert torch.equal(found[1], last)
    assert calls == [5, 9, 7]
    lookup.ask([make_batch(tokens, [1], CPU)])()
    assert calls == [5, 9, 7, 9]


@pytest.mark.parametrize("ahead", [None, 0, 10, 25])
def test_states_come_in_order_and_no_more_are_asked_for_than_there_is_room(
    ahead: int | None,
) -> None:
    """One window is always on its way while another is used; a second reader, an evaluation, comes
    through when the first has filled the account."""
    tokens = conversation_set([[1] * 5] * 8)
    asked: list[int] = []

    def ask(batches: list[Batch]) -> Take:
        asked.extend(batch.numbers[0] for batch in batches)
        return lambda: [(batch.ids_T, batch.ids_T) for batch in batches]

    source = Features(ask, None if ahead is None else 3 * ahead, token_bytes=3)
    first = in_order(source, ((n, [make_batch(tokens, [n], CPU, 1)]) for n in range(6)))
    assert next(first)[0] == 0
    after_one = {None: 1, 0: 2, 10: 3, 25: 6}[ahead]
    assert asked == list(range(after_one)) and source.held == 15 * (after_one - 1)
    for number in (6, 7):
        [(_, [(states, _)])] = in_order(source, [(number, [make_batch(tokens, [number], CPU, 1)])])
        assert len(states) == 5
    assert [number for number, _ in first] == [1, 2, 3, 4, 5]
    assert source.held == 0 and source.most <= 3 * (max(5, ahead or 0) + 5)
