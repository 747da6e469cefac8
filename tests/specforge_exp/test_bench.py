"""Export and bench: the whole pipeline on the tiny target, and the figures it gives."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import missing_code
from safetensors.torch import load_file, save_file

from specforge_exp import paths
from specforge_exp.artifacts import sha256
from specforge_exp.bench import in_process
from specforge_exp.bench.acceptance import (
    PairedAnswer,
)
from specforge_exp.bench.asking import Talk, asking_of
from specforge_exp.bench.sets import bench_sets
from specforge_exp.config import Config, Source
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.drafts.peagle.config import PEagleConfig
from specforge_exp.errors import InputError
from specforge_exp.stages.bench import bench, training_answers
from specforge_exp.stages.export import chosen_checkpoint, export
from specforge_exp.stages.train import train
from specforge_exp.target import Target
from specforge_exp.training.checkpoint import Checkpoint, step_folder


@pytest.fixture(scope="module")
def made(made_tokens: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of what `exported` copies."""
    checkpoints = str(tmp_path_factory.mktemp("exported"))
    cfg = replace(made_tokens, paths=replace(made_tokens.paths, checkpoints=checkpoints))
    cfg.max_steps = 3
    train(cfg)
    export(cfg)
    return cfg


@pytest.fixture
def exported(cfg: Config, tokens: Path, made: Config) -> Path:
    """A draft of three steps; returns its export, in a run of the test's own."""
    cfg.max_steps = 3
    cfg.bench.max_tokens = 12
    cfg.bench.bootstrap = 50
    cfg.bench.datasets = {"stories": Source(path="synthetic:bench/stories", limit=3)}
    shutil.copytree(made.paths.checkpoints, cfg.paths.checkpoints)
    return paths.export_dir(cfg)


NAMES = {
    "fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d",
    "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight",
    "midlayer.post_attention_layernorm.weight",
    *(f"midlayer.self_attn.{n}_proj.weight" for n in "qkvo"),
    *(f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
}  # fmt: skip


def test_export_is_what_engines_load(exported: Path, tiny_target: Target) -> None:
    tensors = load_file(exported / "model.safetensors")
    assert set(tensors) == NAMES
    H, D, V = 128, 512, 1024
    assert tensors["fc.weight"].shape == (H, 3 * H)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (128, 2 * H)
    assert tensors["midlayer.self_attn.k_proj.weight"].shape == (64, 2 * H)
    assert tensors["lm_head.weight"].shape == (D, H)
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert tensors["t2d"].shape == (V,)
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == D
    assert config["max_position_embeddings"] == tiny_target.model.config.max_position_embeddings
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000
    # SGLang takes the outputs of layers 1, 3 and 4, vLLM the inputs of 2, 4 and 5
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert (exported / "run.json").exists()
    assert missing_code(exported) == set()


def test_export_round_trip(exported: Path, tiny_target: Target) -> None:
    draft = Eagle3.load(exported, tiny_target)
    for name, value in load_file(exported / "model.safetensors").items():
        torch.testing.assert_close(
            draft.state_dict()[name], value.to(draft.state_dict()[name].dtype)
        )


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("norm.weight", None, "norm.weight is missing"),
        ("extra.weight", torch.zeros(2), "extra.weight is not expected"),
        ("fc.weight", torch.zeros(2, 2), r"fc.weight has shape \[2, 2\]"),
        ("d2t", torch.zeros(512, dtype=torch.int64), "different tokens"),
        ("d2t", None, "d2t is missing"),
    ],
)
def test_a_broken_export_is_refused(
    exported: Path, tiny_target: Target, name: str, value: Any, words: str
) -> None:
    change(exported, name, value)
    with pytest.raises(InputError, match=words):
        Eagle3.load(exported, tiny_target)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size"])
def test_a_configuration_that_lacks_a_key_is_refused(
    exported: Path, tiny_target: Target, key: str
) -> None:
    file = exported / "config.json"
    config = json.loads(file.read_text())
    del config[key]
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"config.json has no {key}"):
        Eagle3.load(exported, tiny_target)


def test_a_draft_of_another_target_is_refused(
    exported: Path, tiny_target: Target, random_target: Target, cfg: Config, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="made for another target"):
        Eagle3.load(exported, random_target)
    with pytest.raises(InputError, match="auxiliary layers"):
        Eagle3.load(exported, Target(tiny_target.model, [0, 1, 2]))
    other = tmp_path / "other"
    tiny_target.model.save_pretrained(other)
    with pytest.raises(InputError, match="holds a checkpoint of another target"):
        export(replace(cfg, model=replace(cfg.model, path=str(other))))


def test_bench_measures_once(
    exported: Path, cfg: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    average = bench(cfg)
    file = paths.bench_file(cfg)
    result = json.loads(file.read_text())
    assert set(result) >= {"target", "draft", "settings", "datasets", "average"}
    figures = result["datasets"]["stories"]
    assert figures["prompts"] == 3
    assert figures["lossless"] is True
    assert result["average"] == average == figures["accepted_length"] >= 1
    low, high = figures["accepted_length_ci95"]
    assert low <= figures["accepted_length"] <= high
    assert len(figures["acceptance_by_position"]) == cfg.chain_length
    said = capsys.readouterr().out
    assert "lossless" in said and f", on {result['machine']}" in said.splitlines()[0]
    stamp = file.stat().st_mtime_ns
    assert bench(cfg) == average
    assert file.stat().st_mtime_ns == stamp
    assert bench(replace(cfg, bench=replace(cfg.bench, force=True))) == average
    assert file.stat().st_mtime_ns != stamp
    with pytest.raises(InputError, match=r"chain_length was 5, now 4.*bench\.force=true"):
        bench(replace(cfg, bench=replace(cfg.bench, chain_length=4)))


def test_other_prompts_are_another_measurement(exported: Path, cfg: Config, tmp_path: Path) -> None:
    """The file of a data set, the held-out conversations and what the template is told count as
    well; where only the run's folder is at hand its figures are."""
    cfg.bench.datasets = {"own": Source(path=str(tmp_path / "own.jsonl"))}
    own, line = tmp_path / "own.jsonl", '{{"conversations":[{{"role":"user","content":"{}"}}]}}\n'
    own.write_text(line.format("Tell me a story."))
    average = bench(cfg)
    own.write_text(line.format("What is 2 + 3?"))
    with pytest.raises(InputError, match=r"the file of bench data set own has changed.*force=true"):
        bench(cfg)
    own.unlink()
    assert bench(cfg) == average
    own.write_text(line.format("Tell me a story."))
    with pytest.raises(InputError, match="max_length was 256, now 200"):
        bench(replace(cfg, bench=replace(cfg.bench, max_length=200)))
    with pytest.raises(InputError, match="threads was None, now 2; device was cpu, now None"):
        bench(replace(cfg, device="auto", threads=2))
    told = replace(cfg.model, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(InputError, match=r"model\.chat_template_kwargs was None, now"):
        bench(replace(cfg, model=told))
    cfg.bench = replace(cfg.bench, datasets={}, force=True)
    average, cfg.bench.force = bench(cfg), False
    assert bench(cfg) == average
    other = replace(cfg, data=replace(cfg.data, name="other"))
    shutil.copytree(paths.prompts_dir(cfg), paths.prompts_dir(other))
    (paths.prompts_dir(other) / "eval.jsonl").write_text(line.format("Another question."))
    with pytest.raises(InputError, match="the file of bench data set held-out has changed"):
        bench(other)


def test_the_length_that_an_export_names_is_part_of_it(exported: Path, cfg: Config) -> None:
    """vLLM starts a draft in speculators' layout with the number that its config.json has."""
    cfg.export = replace(cfg.export, format="speculators", force=True)
    cfg.bench.chain_length = 3
    export(cfg)
    cfg.export.force, cfg.bench.chain_length = False, 4
    with pytest.raises(InputError, match=r"layout was .* 3 tokens, now .* 4 tokens"):
        export(cfg)


def test_bench_in_bfloat16_sampled_and_without_tokens(
    exported: Path, cfg: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(paths.tokens_dir(cfg))
    cfg.bench = replace(cfg.bench, dtype="bfloat16", temperature=0.7)
    assert bench(cfg) >= 1
    figures = json.loads(paths.bench_file(cfg).read_text())["datasets"]["stories"]
    assert figures["lossless"] is None
    assert figures["novel"]["prompts"] == 0
    assert "sampled" in capsys.readouterr().out


def test_answers_are_new_beside_those_that_trained_the_draft(exported: Path, cfg: Config) -> None:
    """Tokens of another training say nothing of it."""
    assert training_answers(cfg) is not None
    (paths.tokens_dir(cfg) / "run.json").write_text("{}")
    assert training_answers(cfg) is None


def test_samples_follow_the_seed(
    cfg: Config, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def converse(*arguments: Any) -> list[PairedAnswer]:
        seeds.append(arguments[3].initial_seed())
        return []

    monkeypatch.setattr(in_process, "converse", converse)
    asking = asking_of(replace(cfg, seed=3), tiny_tokenizer, None)
    pair: Any = in_process.Pair
    in_process.answer_all("stories", [Talk([[]])], asking, pair)
    assert seeds == [3, 3]


def test_no_held_out_conversation_is_said(cfg: Config) -> None:
    paths.prompts_dir(cfg).mkdir(parents=True)
    (paths.prompts_dir(cfg) / "eval.jsonl").touch()
    with pytest.raises(InputError, match=r"eval\.jsonl has no conversation to ask; set data\.eval"):
        bench_sets(cfg)


def test_neither_is_reused_for_another_draft(exported: Path, cfg: Config) -> None:
    """Trained again under the same name: the export and the figures of before are refused, and the
    commands in the messages make them again; as they were they are reused."""
    bench(cfg)
    assert export(cfg) == exported
    bench(cfg)
    before = load_file(exported / "model.safetensors")["fc.weight"]
    cfg.trainer.resume, cfg.seed, cfg.lr = False, 5, 1e-3
    train(cfg)
    with pytest.raises(InputError, match=r"the checkpoint has changed.*export\.force=true"):
        export(cfg)
    with pytest.raises(InputError, match=r"gone or has changed.*export\.py.*export\.force=true"):
        bench(cfg)
    cfg.export.force = True
    export(cfg)
    assert not torch.equal(load_file(exported / "model.safetensors")["fc.weight"], before)
    with pytest.raises(InputError, match=r"the draft has changed.*bench\.force=true"):
        bench(cfg)
    cfg.bench.force = True
    bench(cfg)
    digest = sha256(paths.run_dir(cfg) / "step-000003" / "draft.safetensors")
    assert json.loads(paths.bench_file(cfg).read_text())["inputs"]["the draft"] == digest
    state = json.loads((paths.run_dir(cfg) / "step-000003" / "state.json").read_text())
    assert state["draft"] == digest
    shutil.rmtree(paths.run_dir(cfg) / "step-000003")  # an export stands without its checkpoint
    cfg.bench.force = False
    bench(cfg)
    with pytest.raises(InputError, match=r"holds no checkpoint.*trainer\.resume=false"):
        export(cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 16}, "has draft.sliding_window=null, this draft has 16; give draft.sl"),
        ({"norm_output": True}, "has draft.norm_output=false, this draft has true; give draft."),
        ({"num_layers": 2}, "has draft.num_layers=1, this draft has 2"),
    ],
)
def test_another_draft_than_was_trained_is_refused(
    exported: Path, cfg: Config, change: dict[str, Any], message: str
) -> None:
    """Weights of the same shapes would be written as a draft that they are not."""
    cfg.export.force = True
    with pytest.raises(InputError, match=re.escape(message)):
        export(replace(cfg, draft=replace(cfg.draft, **change)))
    other: Any = PEagleConfig(name="peagle", draft_vocab_size=512)
    with pytest.raises(InputError, match="is of draft=eagle3, not draft=peagle; give draft=eagle3"):
        export(replace(cfg, draft=other))
    assert export(cfg) == exported


def test_an_export_that_is_replaced_meanwhile_is_refused(
    exported: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures would be of the one, their record of the other."""

    def replaced(cfg: Config) -> dict[str, Any]:
        (exported / "run.json").write_text("of another")
        return {"average": 1.0}

    cfg.bench.force = True
    monkeypatch.setattr("specforge_exp.stages.bench.measure", replaced)
    with pytest.raises(InputError, match=r"run\.json has changed while it was read"):
        bench(cfg)


def test_a_checkpoint_may_go_once_it_is_read(
    exported: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training beside the export keeps its newest ones alone."""
    read = chosen_checkpoint(cfg)

    def then_gone(cfg: Config) -> Checkpoint:
        shutil.rmtree(step_folder(paths.run_dir(cfg), read.step), ignore_errors=True)
        return read

    monkeypatch.setattr("specforge_exp.stages.export.chosen_checkpoint", then_gone)
    assert export(cfg) == exported  # it is the same one
    cfg.export.force = True
    assert export(cfg) == exported


def test_missing_export_names_the_command(cfg: Config) -> None:
    with pytest.raises(InputError, match=r"python export\.py"):
        bench(cfg)
    with pytest.raises(InputError, match=r"holds no checkpoint.*python train\.py"):
        export(cfg)
