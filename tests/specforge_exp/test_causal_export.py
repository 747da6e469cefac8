"""The folder at the end of pretrain and sft: of which checkpoint, how rounded, where it stops."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save
from safetensors.torch import load_file

from specforge_exp import paths
from specforge_exp.artifacts import Fingerprint
from specforge_exp.causal.export import export_model, save_model
from specforge_exp.causal.model import Causal, new_model
from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.target.files import generation_config
from specforge_exp.training.checkpoint import METRICS, Snapshot, save_checkpoint


def test_an_export_without_its_checkpoint_is_not_taken_for_another(cfg: Config) -> None:
    """Its weights are rounded already."""
    folder = paths.export_dir(cfg)
    folder.mkdir(parents=True)
    record = {"inputs": {}, "settings": {"export.dtype": "bfloat16"}}
    (folder / "run.json").write_text(json.dumps(record))
    assert export_model(cfg, "sft") == folder
    cfg.export.dtype = "float32"
    with pytest.raises(InputError, match=r"export\.dtype was bfloat16, now float32.*no checkpoint"):
        export_model(cfg, "sft")


def test_a_damaged_export_is_written_again_or_named(cfg: Config) -> None:
    """Of the checkpoint that it was made of, as long as that is there."""
    run, folder = paths.run_dir(cfg), paths.export_dir(cfg)
    run.mkdir(parents=True)
    (run / METRICS).touch()
    model = Causal(new_model(cfg.model, 0), cfg.causal)
    snapshot = Snapshot(3, model.state_dict(), {}, {})
    step = save_checkpoint(run, snapshot, Fingerprint({}, {}))
    export_model(cfg, "sft")
    file, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    written = file.stat().st_mtime_ns
    assert export_model(cfg, "sft") == folder and file.stat().st_mtime_ns == written
    file.write_bytes(whole[:-1] + b"\0")
    assert export_model(cfg, "sft") == folder and file.read_bytes() == whole
    cfg.export.force = True
    export_model(cfg, "sft")
    assert file.stat().st_mtime_ns > written
    shutil.rmtree(step)
    with pytest.raises(InputError, match="holds no checkpoint of step"):
        export_model(cfg, "sft")
    cfg.export.force = False
    file.write_bytes(whole[:-1] + b"\0")
    with pytest.raises(InputError, match=r"model\.safetensors is damaged .*trainer\.resume=false"):
        export_model(cfg, "sft")


def test_an_export_rounds_weights_alone(cfg: Config, tmp_path: Path) -> None:
    """What chooses experts is no weight, and read in fp32."""
    folder = save(FAMILIES["DeepSeek-V3"](), tmp_path / "model")
    for file in Path(cfg.model.path).glob("tok*.json"):
        shutil.copy(file, folder)
    cfg.model = replace(cfg.model, path=str(folder))
    weights = Causal(new_model(cfg.model, 0), cfg.causal).state_dict()
    (name, *_) = [name for name in weights if name.endswith("e_score_correction_bias")]
    weights[name] = weights[name] + 0.1
    cfg.export.dtype = "bfloat16"
    save_model(tmp_path, cfg, weights, "pretrain")
    saved = load_file(tmp_path / "model.safetensors")
    own = saved[name.removeprefix("model.")]
    assert own.dtype == torch.float32 and own.equal(weights[name])
    assert saved["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stage", "own", "ends"),
    [
        ("sft", "<|endoftext|>", [2, 0]),
        ("pretrain", "<|endoftext|>", 0),
        ("sft", "<|im_end|>", 2),
    ],
)
def test_a_model_that_learnt_answers_stops_behind_them(
    cfg: Config, tmp_path: Path, stage: str, own: str, ends: int | list[int]
) -> None:
    """A base model's configuration knows the end of a document alone."""
    folder = shutil.copytree(cfg.model.path, tmp_path / "base")
    number = {"<|endoftext|>": 0, "<|im_end|>": 2}[own]
    for name, entry in (("generation_config", {"eos_token_id": number, "temperature": 0.7}),
                        ("tokenizer_config", {"eos_token": own})):  # fmt: skip
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    cfg.model = replace(cfg.model, path=str(folder))
    save_model(
        tmp_path / "export", cfg, Causal(new_model(cfg.model, 0), cfg.causal).state_dict(), stage
    )
    assert generation_config(str(tmp_path / "export")).eos_token_id == ends
