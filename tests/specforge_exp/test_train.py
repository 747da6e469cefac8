"""The training loop: it learns, resumes where it was, and refuses what does not belong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_exp import paths
from specforge_exp.config import Config, LossConfig, TrainerConfig
from specforge_exp.data.tokens import read_split
from specforge_exp.errors import InputError
from specforge_exp.stages.export import chosen_checkpoint
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.sft import sft
from specforge_exp.stages.train import objectives, train
from specforge_exp.training import loop
from specforge_exp.training.checkpoint import newest_checkpoint, read_checkpoint, step_folders
from specforge_exp.training.schedule import learning_rate


def metrics(cfg: Config) -> list[dict[str, Any]]:
    file = paths.run_dir(cfg) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(cfg: Config) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in metrics(cfg) if "loss" in m}


@pytest.fixture
def run(cfg: Config, tokens: Path) -> Config:
    """Twelve conversations, batches of 2, two of them a window: three steps an epoch."""
    return nine_steps(cfg)


def nine_steps(cfg: Config) -> Config:
    cfg.trainer = TrainerConfig(
        batch_size=2, accumulate=2, log_every=1, eval_every=4, save_every=2, keep_last=2
    )
    cfg.epochs = 3
    return cfg


@pytest.fixture(scope="module")
def whole(made_tokens: Config) -> dict[int, float]:
    """The losses when a window is one forward."""
    cfg = nine_steps(replace(made_tokens, run_name="whole"))
    cfg.trainer = replace(cfg.trainer, batch_size=4, accumulate=1)
    train(cfg)
    return losses(cfg)


def test_training_learns_and_leaves_a_record(run: Config) -> None:
    length = train(run)
    found = losses(run)
    assert list(found) == list(range(1, 10))
    assert found[9] < 0.8 * found[1]
    folder = paths.run_dir(run)
    assert [f.name for f in step_folders(folder)] == ["step-000008", "step-000009"]
    record = json.loads((folder / "run.json").read_text())
    assert record["evaluation"]["simulated_length"] == length > 1
    by_conversation = json.loads((folder / "evaluation.json").read_text())
    assert len(by_conversation["length"]) == len(by_conversation["slots"]) == 4
    held_out = read_split(paths.tokens_dir(run), "eval")
    assert by_conversation["held_out"] == held_out.digest
    together = sum(by_conversation["length"]) / sum(by_conversation["slots"])
    assert together == pytest.approx(length) and by_conversation["step"] == 9
    lines = metrics(run)
    assert {"lr", "grad_norm", "ce", "alpha/0", "top1/2", "simulated_length"} <= set(lines[0])
    assert any("eval/loss" in line for line in lines)
    read = sum(line["tokens_per_s"] * line["seconds"] for line in lines if "loss" in line)
    assert read == pytest.approx(3 * sum(read_split(paths.tokens_dir(run), "train").lengths))
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == [learning_rate(step, 9, run.lr, run.trainer) for step in range(9)]


def test_complete_is_reused(run: Config) -> None:
    run.max_steps = 2
    first = train(run)
    stamp = (paths.run_dir(run) / "step-000002").stat().st_mtime_ns
    assert train(run) == first
    assert (paths.run_dir(run) / "step-000002").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"lr was 0\.001, now 0\.002.*trainer\.resume=false"):
        train(replace(run, lr=2e-3))


def test_what_is_refused_costs_no_run(run: Config) -> None:
    """Starting over removes the old run only when the new one begins."""
    run.max_steps = 2
    first = train(run)
    for more in ({"init": "nowhere"}, {"batch_size": 4, "gpus": 3}):
        with pytest.raises(InputError):
            train(replace(run, trainer=replace(run.trainer, resume=False, **more)))
    assert train(run) == first and len(step_folders(paths.run_dir(run))) > 0


def test_it_returns_the_objectives(run: Config) -> None:
    run.max_steps = 2
    length = train(run)
    several = replace(run, objectives=["simulated_length", "gpu_hours", "alpha/0"])
    again, hours, alpha = train(several)
    record = json.loads((paths.run_dir(run) / "run.json").read_text())
    assert again == length and alpha == record["evaluation"]["alpha/0"]
    seconds = sum(line.get("seconds", 0) for line in metrics(run))
    assert hours == pytest.approx(seconds / 3600, rel=0.2) and seconds > 0
    on_five = record | {"processes": 2, "workers": 3, "seconds": 3600.0}
    assert objectives(several, on_five)[1] == 5  # type: ignore[index]
    with pytest.raises(InputError, match=r"objectives=tau is not valid; choose one of: simulated_"):
        replace(run, objectives=["tau"])


@pytest.mark.slow
def test_the_last_line_is_a_mean_too(run: Config) -> None:
    """Five steps in lines of three: the second line averages two, also of a run that goes on
    between them."""
    run.max_steps = 5
    train(run)
    single = losses(run)
    coarse = replace(run, run_name="coarse", trainer=replace(run.trainer, log_every=3))
    for _ in range(2):
        train(coarse)
        assert losses(coarse)[5] == pytest.approx((single[4] + single[5]) / 2)
        shutil.rmtree(paths.run_dir(coarse) / "step-000005")


def test_a_truncated_checkpoint_falls_back(run: Config, caplog: pytest.LogCaptureFixture) -> None:
    train(run)
    folder = paths.run_dir(run)
    newest = folder / "step-000009" / "draft.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    found = newest_checkpoint(folder)
    assert found is not None
    assert found.step == 8
    assert "step-000009" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(run: Config) -> None:
    run.max_steps = 2
    train(run)
    (paths.run_dir(run) / "run.json").unlink()
    with pytest.raises(InputError, match=r"seed was 0, now 1.*trainer\.resume=false"):
        train(replace(run, seed=1))
    fresh = replace(run, seed=1, max_steps=1, trainer=replace(run.trainer, resume=False))
    assert train(fresh) > 1
    assert [f.name for f in step_folders(paths.run_dir(run))] == ["step-000001"]


def test_the_first_step_is_the_gradient_of_the_formula(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulating four windows of one batch equals one window's batch of all (one divisor)."""
    one = replace(run, run_name="one", max_steps=1)
    one.trainer = replace(run.trainer, batch_size=1, accumulate=12)
    all_at_once = replace(run, run_name="all", max_steps=1)
    all_at_once.trainer = replace(run.trainer, batch_size=12, accumulate=1)
    train(all_at_once)
    monkeypatch.setattr(loop, "EVAL_TOKENS", 1)  # each held-out conversation by itself
    train(one)
    files = [paths.run_dir(each) / "evaluation.json" for each in (one, all_at_once)]
    alone, together = (json.loads(file.read_text()) for file in files)
    assert alone["slots"] == together["slots"] and len(set(together["length"])) == 4
    assert alone["length"] == pytest.approx(together["length"], rel=1e-4)
    held_out = [metrics(each)[-1]["eval/loss"] for each in (one, all_at_once)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    assert losses(one)[1] == pytest.approx(losses(all_at_once)[1], rel=1e-5)
    a, b = (newest_checkpoint(paths.run_dir(c)) for c in (one, all_at_once))
    assert a is not None
    assert b is not None
    clip, norm = run.trainer.clip, metrics(one)[0]["grad_norm"]
    moments = [value for name, value in a.optimizer.items() if name.endswith(":exp_avg")]
    clipped = 10 * float(torch.cat([value.flatten() for value in moments]).norm())  # 1 / (1 - 0.9)
    assert clipped == pytest.approx(min(clip, norm), rel=1e-3) and norm > clip
    for name in a.draft:
        moment = f"{name}:exp_avg"
        if moment in a.optimizer:
            reference = a.optimizer[moment]
            scale = float(reference.abs().max())
            assert float((reference - b.optimizer[moment]).abs().max()) <= 1e-4 * scale


def test_a_bfloat16_target_trains_an_fp32_draft(run: Config) -> None:
    run.max_steps = 2
    run.model = replace(run.model, dtype="bfloat16")
    assert train(run) > 1
    found = newest_checkpoint(paths.run_dir(run))
    assert found is not None
    assert {value.dtype for name, value in found.draft.items() if "weight" in name} == {
        torch.float32
    }


def test_missing_tokens_name_the_command(cfg: Config) -> None:
    with pytest.raises(InputError, match=r"index\.json does not exist.*python preprocess\.py"):
        train(cfg)


def test_too_few_layers(run: Config, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow"
    shallow.mkdir()
    for file in Path(run.model.path).glob("*.*"):
        if file.is_file():
            (shallow / file.name).write_bytes(file.read_bytes())
    config = json.loads((shallow / "config.json").read_text())
    config["num_hidden_layers"] = 5
    config["layer_types"] = config.get("layer_types", [])[:5] or None
    (shallow / "config.json").write_text(json.dumps(config))
    run.model = replace(run.model, path=str(shallow))
    run.preprocess.force = True
    preprocess(run)
    with pytest.raises(InputError, match=r"5 layers.*model\.aux_layers"):
        train(run)


def test_a_target_that_is_not_there(run: Config) -> None:
    run.model = replace(run.model, path="no/such-model")
    with pytest.raises(InputError, match=r"model\.path=no/such-model is not in the cache"):
        train(run)


def test_a_loss_that_is_none_is_refused_before_anything_is_read(cfg: Config) -> None:
    cfg.loss = replace(cfg.loss, _target_="of_mine.loss")
    with pytest.raises(InputError, match=r"loss\._target_=of_mine\.loss .*'of_mine'.*PYTHON"):
        train(cfg)
    assert not paths.run_dir(cfg).exists()


def test_no_pickle_is_read(run: Config) -> None:
    run.max_steps = 2
    train(run)
    suffixes = {p.suffix for p in (paths.run_dir(run) / "step-000002").iterdir()}
    assert suffixes == {".safetensors", ".json", ".jsonl"}
    assert read_checkpoint(paths.run_dir(run) / "step-000002").step == 2


def test_loss_is_finite_or_training_stops(run: Config) -> None:
    """It names the conversations, and the checkpoint from before is still there."""
    run.lr = 1e30
    run.trainer = replace(run.trainer, clip=1e30, save_every=1)
    with pytest.raises(
        InputError,
        match=r"the (loss|norm[ a-z]*) is (nan|inf) at step \d, on training conv",
    ) as e:
        train(run)
    assert "step-000001 is kept" in str(e.value)
    found = newest_checkpoint(paths.run_dir(run))
    assert found is not None
    assert all(torch.isfinite(value).all() for value in found.draft.values())


def test_a_gradient_that_is_no_number_reaches_no_weight(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bfloat16 can give one while the loss is fine."""
    add_gradients = loop.add_gradients

    def spoil(draft: Any, objective: Any, window: Any, *more: Any) -> Any:
        loss = add_gradients(draft, objective, window, *more)
        if window.step == 1:
            draft.fc.weight.grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(loop, "add_gradients", spoil)
    run.trainer = replace(run.trainer, save_every=1)
    with pytest.raises(InputError, match=r"the norm of the gradient is nan at step 2, on training"):
        train(run)
    assert [folder.name for folder in step_folders(paths.run_dir(run))] == ["step-000001"]


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(run: Config) -> None:
    """R31: evaluated every step with a rate that ruins the draft: the best is not the newest."""
    run.lr = 0.05
    run.trainer = replace(run.trainer, eval_every=1, save_every=9, keep_last=1, keep_best=True)
    train(run)
    lengths = {m["step"]: m["eval/simulated_length"] for m in metrics(run) if "eval/loss" in m}
    best = max(lengths, key=lambda step: lengths[step])
    assert best != 9
    folder = paths.run_dir(run)
    kept = [folder / f"step-{best:06d}", folder / "step-000009"]
    assert step_folders(folder) == kept
    (folder / "run.json").unlink()
    (folder / f"step-00000{1 + (best == 1)}").mkdir()  # it was killed while it removed the old ones
    train(run)
    assert step_folders(folder) == kept
    run.export.best = True
    assert chosen_checkpoint(run).step == best


@pytest.mark.parametrize("layout", ["accumulated", "packed", "checkpointed"])
def test_layout_changes_no_loss(run: Config, whole: dict[int, float], layout: str) -> None:
    """Windows of four conversations: in one forward, in four, packed, recomputed."""
    options = {
        "accumulated": {"batch_size": 1, "accumulate": 4},
        "packed": {"batch_size": 2, "accumulate": 2, "pack_tokens": 300},
        "checkpointed": {"batch_size": 4, "accumulate": 1, "gradient_checkpointing": True},
    }[layout]
    other = replace(run, run_name=layout, trainer=replace(run.trainer, **options))
    train(other)
    assert losses(other) == pytest.approx(whole, rel=1e-5)


def test_metrics_have_the_same_keys_everywhere(run: Config) -> None:
    run.max_steps = 2
    train(run)
    (line, *_) = metrics(run)
    speed = {"tokens_per_s", "supervised_tokens_per_s", "mfu", "peak_memory_mb", "data_wait"}
    assert speed <= set(line)
    assert line["mfu"] > 0  # beside a product that was measured, maybe while others worked
    assert 0 <= line["data_wait"] < 1
    assert line["supervised_tokens_per_s"] < line["tokens_per_s"]


@pytest.mark.parametrize(("gpus", "size"), [(3, 4), (2, 1)])
def test_a_batch_that_does_not_divide_is_refused(gpus: int, size: int) -> None:
    with pytest.raises(InputError, match=rf"batch_size={size} .*trainer\.gpus={gpus}"):
        TrainerConfig(gpus=gpus, batch_size=size)


def test_a_target_of_other_numbers_is_another_run(run: Config) -> None:
    """Its states in bfloat16 are not those that a checkpoint, or a result, was made of."""
    run.max_steps = 2
    train(run)
    run.model = replace(run.model, dtype="bfloat16")
    with pytest.raises(InputError, match=r"model\.dtype was None, now bfloat16"):
        train(run)
    with pytest.raises(InputError, match="device was cpu, now None"):  # a GPU, where there is one
        train(replace(run, device="auto"))
    (paths.run_dir(run) / "run.json").unlink()
    with pytest.raises(InputError, match=r"model\.dtype was None, now bfloat16"):
        train(run)


def test_tokens_of_another_target_are_refused(run: Config, tmp_path: Path) -> None:
    """Its tokenizer gives two words each other's number: nothing else would notice."""
    other = tmp_path / "other"
    shutil.copytree(run.model.path, other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    first, second = list(vocabulary)[400:402]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(text))
    run.model = replace(run.model, path=str(other))
    for stage in (train, sft):
        with pytest.raises(InputError, match=r"target was another than .*preprocess\.force"):
            stage(run)


@pytest.mark.parametrize("term", ["lambda_ce", "lambda_lk", "lambda_lk_alpha"])
def test_specforges_terms_are_means_however_many_forwards(run: Config, term: str) -> None:
    """What lies behind the last token has no row of its own; means of forwards are not added up."""
    run.draft = replace(run.draft, supervision="specforge")
    run.loss = LossConfig(name="sf", **{term: 1.0})
    run.max_steps = 1
    for name, forwards in (("one", 1), ("four", 4)):
        own = replace(run.trainer, batch_size=4 // forwards, accumulate=forwards)
        train(replace(run, run_name=name, trainer=own))
    one, four = (losses(replace(run, run_name=name))[1] for name in ("one", "four"))
    assert four == pytest.approx(one, rel=0.01)
