"""Whatever happened to a file of ours, who reads it says so in one line with the command that makes
it again: never a traceback, never a silent use."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_config
from damage import DAMAGES, damaged
from instant_engine import Instant
from safetensors.torch import load

from specforge_exp import paths
from specforge_exp.config import Config, PathsConfig, Source, TargetConfig
from specforge_exp.data.tokens import read_split
from specforge_exp.drafts.vocabulary import read_mapping
from specforge_exp.errors import InputError
from specforge_exp.stages import preprocess as preprocess_stage
from specforge_exp.stages import regen as regen_stage
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import chosen_checkpoint, export
from specforge_exp.stages.prep import prep
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.regen import regen
from specforge_exp.stages.train import train
from specforge_exp.training.checkpoint import newest_checkpoint, read_checkpoint
from specforge_exp.training.feature_cache import from_disk


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration all of whose artifacts are there."""
    cfg = make_config(tmp_path_factory.mktemp("made"))
    cfg.engine.concurrency = 2
    cfg.max_steps, cfg.target = 2, TargetConfig(cache="disk")
    cfg.bench.max_tokens, cfg.bench.bootstrap = 4, 10
    cfg.bench.datasets = {"stories": Source(path="synthetic:bench/stories", limit=1)}
    cfg.trainer.save_every = cfg.trainer.log_every = 1
    prep(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regen_stage, "make_engine", lambda _: Instant())
        regen(cfg)
    preprocess(cfg)
    train(cfg)
    export(cfg)
    bench(cfg)
    return cfg


def again(stage: Callable[[Config], object], **force: object) -> Callable[[Config], object]:
    """A reader: the stage, with another option where it would otherwise reuse its own artifact."""

    def read(cfg: Config) -> object:
        name = stage.__name__
        return stage(replace(cfg, **{name: replace(vars(cfg)[name], **force)}))

    return read


def checkpoint(cfg: Config) -> object:
    return read_checkpoint(paths.run_dir(cfg) / "step-000002")


def cache(cfg: Config) -> object:
    return from_disk(paths.features_dir(cfg), 3, 128)


def other_run(cfg: Config) -> object:
    return train(replace(cfg, run_name="other"))


Reader = Callable[[Config], object]
READERS: dict[str, tuple[Callable[[Config], Path], str, Reader, str]] = {
    "prompts": (
        paths.prompts_dir, "train eval .jsonl", again(regen, force=True), "prep.force=true"
    ),
    "their record": (
        paths.prompts_dir, "run .json", again(regen, force=True), "prep.force=true"
    ),
    "answers": (
        paths.regen_dir, "train eval .jsonl", again(preprocess, force=True), "regen.force=true"
    ),
    "tokens": (
        paths.tokens_dir, "train-00000 eval-00000 .safetensors", other_run, "preprocess.force=true"
    ),
    "index": (paths.tokens_dir, "index run .json", other_run, "preprocess.force=true"),
    "mapping": (paths.tokens_dir, "vocab_mapping .pt", other_run, "preprocess.force=true"),
    "checkpoint": (
        paths.run_dir, "step-000002/draft step-000002/optimizer step-000002/loop .safetensors",
        checkpoint, "python train.py",
    ),
    "its state": (paths.run_dir, "step-000002/state .json", checkpoint, "python train.py"),
    "run": (paths.run_dir, "run evaluation .json", train, "trainer.resume=false"),
    "metrics": (paths.run_dir, "metrics .jsonl", train, "trainer.resume=false"),
    "export": (paths.export_dir, "model .safetensors", bench, "export.force=true"),
    "its configuration": (paths.export_dir, "config run .json", bench, "export.force=true"),
    "bench": (paths.run_dir, "bench .json", bench, "bench.force=true"),
    "cache": (paths.features_dir, "00000 .safetensors", cache, "the same command"),
    "its index": (paths.features_dir, "index made_of .json", cache, "the same command"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("kind", READERS)
def test_damage_is_named_with_its_remedy(made: Config, kind: str, how: str) -> None:
    folder, names, read, remedy = READERS[kind]
    *stems, suffix = names.split()
    for stem in stems:
        file = folder(made) / f"{stem}{suffix}"
        content = file.read_bytes()
        file.write_bytes(damaged(content, how))
        try:
            with pytest.raises(InputError) as refused:
                read(made)
        finally:
            file.write_bytes(content)
        assert file.name in str(refused.value), stem
        assert remedy in str(refused.value), stem
        assert "\n" not in str(refused.value)


def test_a_run_goes_on_from_the_checkpoint_before(
    made: Config, caplog: pytest.LogCaptureFixture
) -> None:
    file = paths.run_dir(made) / "step-000002" / "optimizer.safetensors"
    content = file.read_bytes()
    file.write_bytes(damaged(content, "flipped"))
    newest = newest_checkpoint(paths.run_dir(made))
    file.write_bytes(content)
    assert newest is not None
    assert newest.step == 1
    assert "optimizer.safetensors is damaged" in caplog.text


@pytest.mark.parametrize("how", [*DAMAGES, "removed"])
def test_metrics_of_an_interrupted_run_are_not_lost(made: Config, how: str) -> None:
    """They come from the checkpoint with which the run goes on."""
    run = run_of(made, f"metrics-{[*DAMAGES, 'removed'].index(how)}")
    folder, metrics = paths.run_dir(run), paths.run_dir(run) / "metrics.jsonl"
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "step-000002")
    lines = [json.loads(line) for line in metrics.read_bytes().splitlines()]
    metrics.write_bytes(damaged(metrics.read_bytes(), how))
    if how == "removed":
        metrics.unlink()
    train(run)
    again = [json.loads(line) for line in metrics.read_bytes().splitlines()]
    for name in ("step", "loss", "eval/loss"):
        assert [line.get(name) for line in again] == [line.get(name) for line in lines]
    assert lines[0]["step"] == 1


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "flipped"])
def test_older_tokens_are_one_line_too(made: Config, how: str) -> None:
    """They have no digests, so what is broken is seen when it is read."""
    folder = paths.tokens_dir(made)
    record = (folder / "run.json").read_bytes()
    older = {k: v for k, v in json.loads(record).items() if k not in ("files", "sha256")}
    (folder / "run.json").write_text(json.dumps(older))
    for name in ("index.json", "train-00000.safetensors", "vocab_mapping.pt"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(damaged(content, how))
        with pytest.raises(InputError, match=rf"{name}.*preprocess\.force=true"):
            if name.endswith(".pt"):
                read_mapping(folder / name)
            else:
                read_split(folder, "train")
        (folder / name).write_bytes(content)
    (folder / "run.json").write_bytes(record)
    torch.save({"d2t": 1}, mapping := folder.with_name("mapping.pt"))
    with pytest.raises(InputError, match="cannot be read"):
        read_mapping(mapping)


def run_of(made: Config, name: str) -> Config:
    """A copy of the complete run, in a folder of its own."""
    shutil.copytree(paths.run_dir(made), paths.run_dir(made).with_name(name))
    return replace(made, run_name=name)


@pytest.mark.parametrize("file", ["", "draft.safetensors", "state.json"])
def test_the_last_step_is_exported_or_none(
    made: Config, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An older checkpoint never takes its place, and the command in the message brings it back:
    not trained from the start, and equal to the bit."""
    run = run_of(made, f"last-{file}")
    folder = paths.run_dir(run)
    last = folder / "step-000002"
    content = {path.name: path.read_bytes() for path in last.iterdir()}
    if file:
        (last / file).write_bytes(damaged(content[file], "truncated"))
    else:
        shutil.rmtree(last)
    with pytest.raises(InputError) as refused:
        export(run)
    message = str(refused.value)
    assert str(last / file) in message and "step 2" in message and "\n" not in message
    assert "make it again with: python train.py (with the same options)" in message
    assert "[1]" in message and "export.step=" in message
    caplog.set_level("INFO")
    train(run)
    assert "continuing after step 1" in caplog.text
    for name in ("draft.safetensors", "optimizer.safetensors"):  # the others have times
        assert (last / name).read_bytes() == content[name]
    assert export(run) == paths.export_dir(run)
    assert bench(run) == bench(made)
    train(run)
    assert caplog.text.count("continuing after step 1") == 1
    shutil.rmtree(last)
    run.export = replace(run.export, step=1, force=True)
    export(run)  # asked for by its number
    bench(replace(run, bench=replace(run.bench, force=True)))


def test_a_run_without_checkpoints_stays_complete(made: Config) -> None:
    run = run_of(made, "without")
    for step in paths.run_dir(run).glob("step-*"):
        shutil.rmtree(step)
    assert train(run) == train(made)
    with pytest.raises(InputError, match=r"no checkpoint.*train\.py trainer\.resume=false"):
        export(run)


def test_an_unfinished_run_is_exported_at_its_newest_step(made: Config) -> None:
    """What the training continues from, an export does not take: it could be any older draft. And
    figures are not of a step that the run has gone past."""
    run = run_of(made, "unfinished")
    folder = paths.run_dir(run)
    record = (folder / "run.json").read_bytes()
    (folder / "run.json").unlink()
    newest = folder / "step-000002" / "optimizer.safetensors"
    content = newest.read_bytes()
    newest.unlink()
    with pytest.raises(
        InputError, match=r"step-000002/optimizer\.safetensors is missing.*train\.py"
    ):
        chosen_checkpoint(run)
    shutil.move(newest.parent, away := folder / "away")
    run.export = replace(run.export, force=True)
    export(run)
    run.bench = replace(run.bench, force=True)
    bench(run)
    shutil.move(away, newest.parent)
    newest.write_bytes(content)
    (folder / "run.json").write_bytes(record)
    with pytest.raises(InputError, match=r"is of step 1, but .* has 2 by now.*export\.force=true"):
        bench(run)
    export(run)
    bench(run)


@pytest.mark.parametrize(("file", "how"), [("run", "{}"), ("evaluation", "flipped")])
def test_an_unknown_end_is_not_guessed(made: Config, file: str, how: str) -> None:
    run = run_of(made, f"end-{file}")
    path = paths.run_dir(run) / f"{file}.json"
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(InputError, match=rf"{file}\.json .*export\.step=.*trainer\.resume=false"):
        export(run)
    run.export = replace(run.export, step=2)
    export(run)
    with pytest.raises(InputError, match=r"step-000007 does not exist; steps there: \[1, 2\]"):
        export(replace(run, export=replace(run.export, step=7)))


def test_the_best_step_is_exported_or_none(made: Config) -> None:
    """Not the last in its place: neither when it is gone, nor when metrics.jsonl names another."""
    run = replace(made, run_name="best", max_steps=3, export=replace(made.export, best=True))
    run.lr = 0.5  # it gets worse
    run.trainer = replace(made.trainer, eval_every=1, save_every=9, keep_last=1, keep_best=True)
    train(run)
    folder, metrics = paths.run_dir(run), paths.run_dir(run) / "metrics.jsonl"
    best = chosen_checkpoint(run)
    assert best.step < 3
    content = metrics.read_bytes()
    metrics.write_bytes(b"".join(content.splitlines(keepends=True)[-2:]))
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged.*trainer\.resume=false"):
        chosen_checkpoint(run)
    metrics.write_bytes(content)
    shutil.rmtree(folder / f"step-{best.step:06d}")
    remedy = r"python train\.py trainer\.keep_best=true trainer\.resume=false"
    with pytest.raises(InputError, match=rf"step-00000{best.step} does not exist.*{remedy}"):
        chosen_checkpoint(run)
    train(replace(run, trainer=replace(run.trainer, resume=False)))
    again = chosen_checkpoint(run)
    assert again.step == best.step
    assert all(torch.equal(again.draft[name], best.draft[name]) for name in best.draft)


@pytest.mark.parametrize("how", [*DAMAGES, "removed"])
def test_a_damaged_block_is_encoded_again(
    made: Config, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted preprocess goes on with is what it wrote, to the byte."""
    run = replace(made, paths=PathsConfig(str(tmp_path), made.paths.checkpoints))
    shutil.copytree(paths.regen_dir(made), paths.regen_dir(run))
    source = paths.regen_dir(run) / "train.jsonl"
    two = [{"role": "user", "content": "Hi"}] * 2  # no answer: set aside
    bad = json.dumps({"id": "bad", "conversations": two})
    source.write_text(source.read_text() + bad + "\n")
    record = json.loads((source.parent / "run.json").read_text())
    del record["files"], record["sha256"]
    (source.parent / "run.json").write_text(json.dumps(record))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preprocess_stage, "merge", interrupt)
        preprocess(run)
    folder = paths.tokens_dir(run)
    blocks = folder.with_name(folder.name + ".partial") / "blocks"
    whole = load((blocks / "train-000000.safetensors").read_bytes())
    for name in ("train-000000.safetensors", "train-000000.rejected.jsonl"):
        content = (blocks / name).read_bytes()
        (blocks / name).write_bytes(damaged(content, how))
        if how == "removed":
            (blocks / name).unlink()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(preprocess_stage, "merge", interrupt)
            preprocess(run)
        if name.endswith(".jsonl"):
            assert (blocks / name).read_bytes() == content
        tensors = load((blocks / "train-000000.safetensors").read_bytes())
        assert all(torch.equal(tensors[key], whole[key]) for key in whole)
    assert len(read_split(preprocess(run), "train")) == 12


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt
