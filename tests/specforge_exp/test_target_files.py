"""Reading a model's folder as users have it: without some of its files, or with damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from families import FAMILIES, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config

from specforge_exp.causal.model import new_model
from specforge_exp.config import Config, ModelConfig
from specforge_exp.data.rendering import eos_token_ids
from specforge_exp.errors import InputError
from specforge_exp.stages.regen import unready
from specforge_exp.target.files import generation_config, load_tokenizer, model_config
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
    configured(folder, tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer.model").touch()  # as a full disk leaves it
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


OPTIONS = {"dtype": torch.float32, "output_loading_info": True}
HEAD, UP, EMBEDDINGS = "lm_head.weight", "model.layers.3.mlp.up_proj.weight", "model.embed_tokens"


def tiny_weights() -> dict[str, Tensor]:
    """Those of the tiny target."""
    return load_file(Path(TINY.path) / "model.safetensors")


def loaded(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Any]] = dict) -> Any:
    """The model of a folder, whose weights are the tiny target's with these instead."""
    weights = tiny_weights()
    save_file({**weights, **change(weights)}, folder / "model.safetensors", {"format": "pt"})
    return from_files(ModelConfig("m", str(folder)), torch.device("cpu"), OPTIONS)


def configured(folder: Path, **changes: Any) -> None:
    """Change entries of its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_is_refused_alone_and_beside_weights(folder: Path) -> None:
    """Where peft is installed transformers adds one to whatever weights stand beside it, also to
    those that it was merged into; elsewhere it reads the base alone."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    words = r"has an adapter_config\.json: .* merge it"
    with pytest.raises(InputError, match=words):
        loaded(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=words):
        model_config(ModelConfig("m", str(folder)))


def test_weights_of_two_saves_are_refused(folder: Path) -> None:
    """transformers reads the single file, engines what the index names."""
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    model_config(ModelConfig("m", str(folder)))  # of the single file, as MLX writes one
    index.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(InputError, match=r"two sets of weights, .* remove one"):
        loaded(folder)


def test_a_head_that_config_json_denies_is_refused(folder: Path) -> None:
    """It says that the head is the embeddings, which engines then read; transformers does not."""
    loaded(folder, lambda held: {HEAD: held[f"{EMBEDDINGS}.weight"].clone()})
    other = {HEAD: torch.zeros(1024, 128, dtype=torch.bfloat16)}
    with pytest.raises(InputError, match="tie_word_embeddings=true, and its files hold a head"):
        loaded(folder, lambda _: other)
    configured(folder, tie_word_embeddings=False)
    loaded(folder, lambda _: other)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(folder: Path, value: float) -> None:
    def damaged(held: dict[str, Tensor]) -> dict[str, Tensor]:
        held[UP][5, 7] = value
        return held

    with pytest.raises(InputError, match=rf"{UP} holds NaN or infinite numbers"):
        loaded(folder, damaged)


class Code:
    """What a pickle runs when it is opened."""

    def __reduce__(self) -> Any:
        return exit, ("it ran",)


@pytest.mark.parametrize(
    ("held", "cut", "words"),
    [({"x": Code()}, None, "holds more than tensors"), ({}, 300, "PytorchStreamReader")],
)
def test_a_bin_file_that_cannot_be_read_is_no_traceback(
    folder: Path, held: dict[str, Any], cut: int | None, words: str
) -> None:
    file = folder / "pytorch_model.bin"
    torch.save({**tiny_weights(), **held}, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match=words):
        from_files(ModelConfig("m", str(folder)), torch.device("cpu"), OPTIONS)


@pytest.mark.parametrize("content", ["null", '{"model_type": "qwen3", "dtype": "auto"}'])
def test_a_config_that_means_nothing_is_no_traceback(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match="cannot be loaded as a folder"):
        from_files(ModelConfig("m", str(folder)), torch.device("cpu"), OPTIONS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-q4.gguf", "GGUF is not read"),
        ("checkpoint-500/model.safetensors", "name one of them"),
        ("snapshots/abc/config.json", "its snapshots/"),
        ("pytorch_model_fsdp_0/.metadata", "accelerate merge-weights"),
        ("zero_to_fp32.py", "DeepSpeed's parts"),
        ("model-00001-of-00002.safetensors", r"index\.json is missing"),
        ("consolidated.safetensors", "its maker's own format"),
    ],
)
def test_what_a_folder_has_in_the_place_of_weights_is_said(
    folder: Path, name: str, words: str
) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match=words):
        from_files(ModelConfig("m", str(folder)), torch.device("cpu"), OPTIONS)


def test_what_git_left_of_a_large_file_is_said(folder: Path) -> None:
    (folder / "a.folder").mkdir()
    left = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n"
    (folder / "model.safetensors").write_text(left)
    with pytest.raises(InputError, match=r"model\.safetensors .*: git lfs pull"):
        from_files(ModelConfig("m", str(folder)), torch.device("cpu"), OPTIONS)


def test_scales_that_nothing_reads_are_refused_in_any_case(folder: Path) -> None:
    """model.unused_weights=true would leave weights that are other numbers: methods that
    transformers does not know it passes over. Scales of what is not used itself do not count, nor
    those of a cache of keys and values."""
    other = "model.layers.8.mlp.up_proj.weight"
    configured(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    cfg = ModelConfig("m", str(folder), unused_weights=True)
    names = [other, f"{other}_scale", "model.layers.0.self_attn.k_proj.k_scale"]
    check_weights(cfg, loaded(folder, lambda _: {name: torch.ones(1) for name in names})[1])
    names.append(f"{UP}_scale")
    report = loaded(folder, lambda _: {name: torch.ones(1) for name in names})[1]
    with pytest.raises(InputError, match=rf"1 scales are not used \({UP}_scale, "):
        check_weights(cfg, report)


def test_quantised_weights_are_not_trained_and_leave_no_trace(folder: Path) -> None:
    """A model made of such a configuration alone has plain weights, and says so in its export."""
    configured(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(InputError, match=r"cannot be trained \(its weights are quantised: fp8\)"):
        new_model(ModelConfig("m", str(folder)), 0)
    model = new_model(ModelConfig("m", str(folder), init="random"), 0)
    assert "quantization_config" not in model.config.to_dict()


def test_a_model_that_is_not_causal_is_named(tmp_path: Path) -> None:
    T5Config(vocab_size=64, d_model=16, num_layers=8).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="t5 is no causal language model"):
        from_files(ModelConfig("m", str(tmp_path)), torch.device("cpu"), OPTIONS)
