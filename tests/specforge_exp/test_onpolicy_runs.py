"""Training with onpolicy=replay and =rollout: resumed and laid out alike, counted, refused by name,
begun with another run's weights."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from conftest import REPOSITORY, SMALL, make_config
from holding import environment, hold, release

from specforge_exp import paths
from specforge_exp.artifacts import read_record
from specforge_exp.bench.acceptance import PairedAnswer, accepted_length
from specforge_exp.bench.speculative import Decoding, generate, speculate
from specforge_exp.config import Config
from specforge_exp.data.rendering import eos_token_ids
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.eagle3 import Eagle3
from specforge_exp.errors import InputError
from specforge_exp.onpolicy.rollout import read_round, round_file
from specforge_exp.records import whole_lines
from specforge_exp.stages.export import export
from specforge_exp.stages.prep import prep
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.train import read_tokens, train
from specforge_exp.target import load_target, load_tokenizer
from specforge_exp.training.batches import window_of
from specforge_exp.training.checkpoint import step_folders

DFLASH = DFlashConfig(
    _target_="specforge_exp.drafts.dflash.DFlash", name="dflash", draft_vocab_size=512,
    block_size=4, num_layers=2, num_features=3, min_loss_tokens=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Replay of an EAGLE-3 draft, on tokens that are there; six steps."""
    cfg = make_config(tmp_path_factory.mktemp("onpolicy"))
    cfg.preprocess.source = "prep"
    prep(cfg)
    preprocess(cfg)
    cfg.draft._target_ = "specforge_exp.drafts.eagle3.Eagle3"
    cfg.epochs, cfg.onpolicy.name, cfg.onpolicy.anchors = 2, "replay", 8
    cfg.trainer = replace(cfg.trainer, batch_size=4, save_every=3, log_every=1)
    return cfg


def lines(cfg: Config) -> list[dict[str, Any]]:
    text = (paths.run_dir(cfg) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


@pytest.fixture(scope="module")
def run(base: Config) -> Config:
    """The run of `base`."""
    cfg = replace(base, run_name="whole")
    train(cfg)
    return cfg


def test_it_is_counted(run: Config) -> None:
    """The length is one that a verification can have; the target reads at most as much again."""
    for line in lines(run):
        assert 1 <= line["onpolicy/accepted_length"] <= 1 + run.draft.steps
        assert line["onpolicy/anchors"] > 0
        tokens = line["tokens_per_s"] * line["seconds"]
        assert 0 < line["onpolicy/verified_tokens"] <= tokens


@pytest.mark.parametrize("kind", ["eagle3", pytest.param("dflash", marks=pytest.mark.slow)])
def test_resumed_to_the_bit(base: Config, run: Config, kind: str) -> None:
    """With sampled proposals in DFlash's case."""
    cfg = run
    if kind == "dflash":
        sampled = replace(base.onpolicy, temperature=1.0)
        cfg = replace(base, run_name="sampled", draft=DFLASH, onpolicy=sampled)
        train(cfg)
    whole = [(line["step"], line["loss"]) for line in lines(cfg)]
    shutil.rmtree(step_folders(paths.run_dir(cfg))[-1])
    train(cfg)
    assert [(line["step"], line["loss"]) for line in lines(cfg)] == whole
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "layout", ["packed", "accumulated", pytest.param("two processes", marks=pytest.mark.slow)]
)
def test_layout_changes_no_loss(base: Config, run: Config, layout: str) -> None:
    """Divisors and proposals do not depend on it."""
    options = {
        "packed": {"pack_tokens": 300},
        "accumulated": {"batch_size": 2, "accumulate": 2},
        "two processes": {"gpus": 2},
    }[layout]
    name = layout.replace(" ", "-")
    cfg = replace(base, run_name=name, max_steps=3, trainer=replace(base.trainer, **options))
    schedule = replace(run, run_name="short", max_steps=3)
    train(schedule)
    train(cfg)
    found, expected = ([line["loss"] for line in lines(c)] for c in (cfg, schedule))
    assert found == pytest.approx(expected, rel=2e-5)
    verified = [[line["onpolicy/verified_tokens"] for line in lines(c)] for c in (cfg, schedule)]
    assert verified[0] == verified[1]


@pytest.fixture(scope="module")
def off(base: Config) -> Config:
    """Three steps of `base` without replay."""
    cfg = replace(base, run_name="off", max_steps=3, onpolicy=replace(base.onpolicy, name="none"))
    train(cfg)
    return cfg


@pytest.mark.slow
def test_it_starts_at_a_step(base: Config, off: Config) -> None:
    """Before it, the losses are those without."""
    later = replace(base, run_name="later", max_steps=3, onpolicy=replace(base.onpolicy, start=2))
    train(later)
    found, expected = ([line["loss"] for line in lines(c)] for c in (later, off))
    assert found[:2] == expected[:2]
    assert found[2] != expected[2]
    assert ["onpolicy/anchors" in line for line in lines(later)] == [False] * 2 + [True]
    assert not any(key.startswith("onpolicy") for line in lines(off) for key in line)


def test_replay_alone(base: Config, off: Config, caplog: pytest.LogCaptureFixture) -> None:
    """Without the text's loss, shorter and beyond rejections: the steps before it are those
    without, evaluation has the text's loss, and what the target read is summed up."""
    own = replace(base.onpolicy, level0=0.0, start=1, length=2, beyond=1)
    cfg = replace(base, run_name="alone", max_steps=3, onpolicy=own)
    with caplog.at_level("INFO"):
        train(cfg)
    found, expected = lines(cfg), lines(off)
    assert found[0]["loss"] == expected[0]["loss"]
    assert all(x["loss"] == pytest.approx(x["onpolicy/loss"]) for x in found[1:])
    held_out = [read_record(paths.run_dir(c) / "run.json")["evaluation"] for c in (cfg, off)]
    assert held_out[0]["loss"] == pytest.approx(held_out[1]["loss"], rel=0.2)
    verified = sum(x["onpolicy/verified_tokens"] for x in found[1:])
    read = round(sum(x["tokens_per_s"] * x["seconds"] for x in found[1:]))
    assert verified == sum(x["onpolicy/anchors"] for x in found[1:])  # the first of two tokens
    said = f"the target read {verified:.0f} proposed tokens beside {read} of conversations "
    assert said + f"({1 + verified / read:.2f} times as many as without)" in caplog.text


def test_it_begins_with_another_run(base: Config, run: Config) -> None:
    """A run's weights are the ones before the first step; another vocabulary is refused."""
    from safetensors.torch import load_file, save_file

    trainer = replace(base.trainer, init="whole", dump=[1])
    cfg = replace(base, run_name="continued", max_steps=1, trainer=trainer)
    train(cfg)
    first = load_file(paths.run_dir(cfg) / "dump" / "step-000001-rank0.safetensors")
    [line] = lines(cfg)
    accepted_RK = first["sample0.accepted_RK"]
    length = 1 + float(accepted_RK.sum()) / len(first["sample0.anchor_R"])
    assert line["onpolicy/accepted_length"] == pytest.approx(length)
    assert first["sample0.tokens_KR"].T.shape == accepted_RK.shape
    last = load_file(step_folders(paths.run_dir(run))[-1] / "draft.safetensors")
    assert torch.equal(first["draft.fc.weight"], last["fc.weight"])
    with pytest.raises(InputError, match=r"trainer.init is not read any more"):
        train(replace(cfg, trainer=replace(trainer, init=None)))
    with pytest.raises(InputError, match=r"neither a run with a checkpoint"):
        train(replace(cfg, run_name="x", trainer=replace(trainer, init="nothing")))
    export(run)
    other = Path(paths.run_dir(cfg)) / "other"
    other.mkdir()
    last["d2t"] = last["d2t"] + 1
    (other / "config.json").write_text((paths.export_dir(run) / "config.json").read_text())
    save_file(last, other / "model.safetensors")
    with pytest.raises(InputError, match=r"d2t and t2d name different tokens"):
        train(replace(cfg, run_name="x", trainer=replace(trainer, init=str(other))))


REFUSED: list[tuple[str, Callable[[Config], dict[str, Any]]]] = [
    ("target.cache=none, not disk", lambda c: {"target": replace(c.target, cache="disk")}),
    (
        "target.placement=inprocess, not ray",
        lambda c: {
            "target": replace(c.target, placement="ray"),
            "onpolicy": replace(c.onpolicy, name="rollout"),
        },
    ),
    (
        "target.engine=transformers, not vllm",
        lambda c: {"target": replace(c.target, placement="ray", engine="vllm")},
    ),
    ("target.shard=false, not true", lambda c: {"target": replace(c.target, shard=True)}),
    ("trainer.shard=false, not true", lambda c: {"trainer": replace(c.trainer, shard=True)}),
    ("onpolicy.length=9 is above", lambda c: {"onpolicy": replace(c.onpolicy, length=9)}),
    ("draft.supervision=inference", lambda c: {"draft": replace(c.draft, supervision="specforge")}),
]


@pytest.mark.parametrize(("message", "change"), REFUSED, ids=[m for m, _ in REFUSED])
def test_refused_by_name(
    base: Config, message: str, change: Callable[[Config], dict[str, Any]]
) -> None:
    """What replay cannot go with, before anything is loaded."""
    with pytest.raises(InputError, match=message):
        replace(base, **change(base))


@pytest.fixture(scope="module")
def rolled(base: Config) -> Config:
    """As `run`, with rollouts: rounds begin with steps 1 and 5."""
    own = replace(base.onpolicy, name="rollout", sync_every=4, max_tokens=30, errors=1.0)
    trainer = replace(base.trainer, save_every=1, keep_last=9)
    cfg = replace(base, run_name="rolled", onpolicy=own, trainer=trainer)
    train(cfg)
    return cfg


@pytest.mark.slow
def test_rollouts_are_what_bench_measures(rolled: Config) -> None:
    """With the weights that the round began with, on the prompts of each window: the answers are
    the target's own, and accepted_length is bench's of them together."""
    from safetensors.torch import load_file

    mapping, splits = read_tokens(paths.tokens_dir(rolled))
    target = load_target(
        rolled.model, torch.device("cpu"), feeds=partial(Eagle3.target_layers, rolled.draft)
    )
    for first, steps in ((0, [1, 4]), (4, [5])):
        draft = Eagle3.new(target, rolled.draft, mapping, rolled.seed)
        if first:
            file = step_folders(paths.run_dir(rolled))[first - 1] / "draft.safetensors"
            draft.load_state_dict(load_file(file))
        kept = read_round(round_file(paths.run_dir(rolled), first), first + 1)
        ends = frozenset(eos_token_ids(rolled.model.path, load_tokenizer(rolled.model)))
        decoding = Decoding(30, rolled.draft.steps, eos=ends)
        for step in steps:
            requests = []
            for number in window_of(12, 4, rolled.seed, *divmod(step - 1, 3)):
                ids_T, turns_T = splits.train[number]
                said, before = [], 0
                for turn in range(1, int(turns_T.max()) + 1):
                    places = (turns_T == turn).nonzero()[:, 0].tolist()
                    said += ids_T[before : places[0]].tolist()
                    drafted = speculate(target, draft.decoder(), draft.draft_ids_D, said, decoding)
                    alone = generate(target, said, decoding)
                    requests.append(PairedAnswer(drafted, alone, 0.0))
                    said, before = said + alone.tokens, places[-1] + 1
                    if said[-1] not in ends:
                        break
                assert kept[number].ids_T.tolist() == said
            expected = accepted_length(requests, "conversations")
            assert lines(rolled)[step - 1]["onpolicy/accepted_length"] == pytest.approx(expected)


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_resumed_within_a_round(rolled: Config, step: int) -> None:
    """To the bit, from the round's file; without it the training is refused."""
    cfg = replace(rolled, run_name=f"resumed-{step}")
    folder = paths.run_dir(cfg)
    shutil.copytree(paths.run_dir(rolled), folder)
    (folder / "run.json").unlink()
    for checkpoint in step_folders(folder)[step:]:
        shutil.rmtree(checkpoint)
    file = round_file(folder, 0 if step == 2 else 4)
    file.rename(folder / "away")
    with pytest.raises(InputError, match=rf"within a round .*{file.name} .*trainer.resume=false"):
        train(cfg)
    (folder / "away").rename(file)
    train(cfg)
    assert [x["loss"] for x in lines(cfg)] == [x["loss"] for x in lines(rolled)]
    last = [step_folders(paths.run_dir(c))[-1] / "draft.safetensors" for c in (cfg, rolled)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["accumulated", "two processes, packed"])
def test_layout_changes_no_rollout(rolled: Config, layout: str) -> None:
    """Each process answers for some conversations of a round, and all are trained on."""
    options = {"gpus": 2, "pack_tokens": 200}
    if layout == "accumulated":
        options = {"batch_size": 2, "accumulate": 2}
    cfg = replace(rolled, run_name=layout[:3], trainer=replace(rolled.trainer, **options))
    cfg.max_steps = 3
    train(cfg)
    schedule = replace(rolled, run_name="rolled-short", max_steps=3)
    train(schedule)
    found, expected = lines(cfg), lines(schedule)
    for key in ("loss", "onpolicy/accepted_length", "onpolicy/verifications"):
        assert [x[key] for x in found] == pytest.approx([x[key] for x in expected], rel=2e-5)


@pytest.mark.slow
def test_killed_and_resumed_to_the_bit(base: Config, tmp_path: Path) -> None:
    """With sampled answers: SIGKILL after steps 2 and 5, of rounds that begin with 1 and 4."""
    words = [
        str(REPOSITORY / "train.py"), "experiment=smoke", "model=tiny", "data=synthetic",
        *SMALL, f"model.path={base.model.path}", "onpolicy=rollout",
        f"model.name={base.model.name}", f"draft.draft_vocab_size={base.draft.draft_vocab_size}",
        f"max_length={base.max_length}", f"paths.datasets={base.paths.datasets}", "epochs=3",
        f"paths.checkpoints={tmp_path}", "target.cache=none", "onpolicy.sync_every=3",
        "onpolicy.temperature=1", "onpolicy.max_tokens=12", "trainer.batch_size=4", "max_steps=7",
        "trainer.log_every=1", "trainer.save_every=1", "device=cpu", "trainer.gpus=1",
    ]  # fmt: skip

    def steps(name: str) -> list[tuple[int, float]]:
        file = tmp_path / name / "metrics.jsonl"
        found = whole_lines(file) if file.exists() else []
        return [(line["step"], line["loss"]) for line in found if "loss" in line]

    whole = warm.run([*words, "run_name=whole"])
    assert whole.returncode == 0, whole.stderr
    hold(tmp_path / "killed", 6)
    for least in (2, 5):
        process = warm.start([*words, "run_name=killed"], env=environment())
        while process.poll() is None and len(steps("killed")) < least:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    release(tmp_path / "killed")
    done = warm.run([*words, "run_name=killed"])
    assert done.returncode == 0, done.stderr
    assert steps("killed") == steps("whole")
    assert [step for step, _ in steps("whole")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_server_does_not_answer(rolled: Config, caplog: pytest.LogCaptureFixture) -> None:
    """Refused by name; a dry run trains nothing."""
    served = replace(rolled.engine, name="vllm")
    with pytest.raises(InputError, match=r"engine.name=vllm does not serve it"):
        train(replace(rolled, run_name="served", engine=served))
    cfg = replace(rolled, run_name="dry", onpolicy=replace(rolled.onpolicy, dry_run=True))
    with caplog.at_level("INFO"):
        train(cfg)
    assert "2 rounds, 20 conversations answered one at a time" in caplog.text
    assert not paths.run_dir(cfg).exists()
