"""Reading a model's folder as users have it: without some of its files, or with damaged ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from families import FAMILIES, save

from specforge_exp.config import Config, ModelConfig
from specforge_exp.data.rendering import eos_token_ids
from specforge_exp.errors import InputError
from specforge_exp.stages.regen import unready
from specforge_exp.target.files import generation_config, load_tokenizer
from specforge_exp.target.loading import check_weights, from_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny target without its weights."""
    return Path(
        shutil.copytree(TINY.path, tmp_path / "mine", ignore=shutil.ignore_patterns("*.safe*"))
    )


def test_without_a_generation_config_the_configuration_says_the_ends(folder: Path) -> None:
    """As `generate` and servers take it: a fine-tune often has no generation_config.json."""
    tokenizer = load_tokenizer(ModelConfig("mine", str(folder)))
    (folder / "generation_config.json").unlink()
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "eos_token_id": [5, 7]}))
    assert eos_token_ids(str(folder), tokenizer) == {5, 7, tokenizer.eos_token_id}


def test_a_damaged_generation_config_is_not_taken_for_none(folder: Path) -> None:
    """Its ends and its sampling would be lost without a word."""
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"mine/generation_config\.json cannot be read: "):
        generation_config(str(folder))


def test_a_tokenizer_that_is_missing_or_damaged_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"mine cannot be loaded as a folder: .* \(its tokenizer\)"
    ):
        load_tokenizer(ModelConfig("mine", str(folder)))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"mine has no tokenizer\.json; copy it from the model"):
        load_tokenizer(ModelConfig("mine", str(folder)))


def test_regen_says_first_that_there_is_no_model(cfg: Config, tmp_path: Path) -> None:
    """Not what its generation_config.json would say."""
    cfg.model.path = str(tmp_path / "nowhere")
    (said,) = unready(cfg)
    assert "nowhere" in said and "regen.top_p" not in said


def test_weights_go_to_their_device_as_they_are_read(tmp_path: Path) -> None:
    """Not to the CPU first, where experts and numbers of another type would be a whole copy for
    each process."""
    cfg = ModelConfig("t", str(save(FAMILIES["Qwen3-MoE"](), tmp_path)))
    options = {"dtype": torch.bfloat16, "output_loading_info": True}
    model, report = from_files(cfg, torch.device("meta"), options)
    assert {(w.device.type, w.dtype) for w in model.parameters()} == {("meta", torch.bfloat16)}
    check_weights(cfg, report)
