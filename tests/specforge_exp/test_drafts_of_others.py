"""Drafts of other makers: what they leave out, and say by other names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from test_speculators import KINDS, draft_of, same_weights

from specforge_exp.config import Config
from specforge_exp.drafts.layers import RMSNorm
from specforge_exp.errors import InputError
from specforge_exp.stages.export import converted
from specforge_exp.target import Target


def said_of(draft: Any) -> tuple[set[float], float]:
    """What its norms add, and the base of its rotary embedding."""
    norms = {module.eps for module in draft.modules() if isinstance(module, RMSNorm)}
    return norms, draft.rotary.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("drafted", [None, 4])
@pytest.mark.parametrize("name", ["eagle31", "peagle", "dspark"])
def test_numbers_that_no_shape_shows(
    name: str, drafted: int | None, tiny_target: Target, tmp_path: Path
) -> None:
    """They are those of config.json."""
    draft, target = draft_of(name, tiny_target)
    draft.write(tmp_path, target, TINY.path, torch.float32, drafted)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    layer = config.get("transformer_layer_config", config)
    layer |= {"rms_norm_eps": 3e-5, "rope_theta": 5e5, "rope_parameters": None}
    file.write_text(json.dumps(config))
    loaded = type(draft).load(tmp_path, target)
    assert said_of(loaded) == ({3e-5}, 5e5)
    other = tmp_path / "other"
    other.mkdir()
    loaded.write(other, target, TINY.path, torch.float32, None if drafted else 4)
    assert said_of(type(draft).load(other, target)) == ({3e-5}, 5e5)


def test_other_makers_folders(tiny_target: Target, tmp_path: Path) -> None:
    """What they leave out is as usual; a copy of the target's weights is none of the draft's, and
    another's is refused."""
    draft, target = draft_of("eagle3", tiny_target)
    draft.write(tmp_path, target, TINY.path, torch.float32)
    file, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    for name in (
        "eagle_config", "eagle_aux_hidden_state_layer_ids", "target_model_name_or_path",
        "rope_parameters", "rope_theta", "target_hidden_size", "num_hidden_layers", "head_dim",
    ):  # fmt: skip
        del config[name]
    config |= {"pretraining_tp": 1, "use_cache": True, "transformers_version": "4.57.1"}
    config |= {"rms_norm_eps": None, "sliding_window": 16}  # which no layer has
    file.write_text(json.dumps(config))
    tensors["embed_tokens.weight"] = target.embed_VH.clone()
    tensors |= {f"verifier_{name}.weight": torch.ones(1) for name in ("lm_head", "norm")}
    save_file(tensors, weights)
    loaded = type(draft).load(tmp_path, target)
    assert same_weights(loaded, draft)
    assert loaded.written(target, "") == draft.written(target, "")
    assert said_of(loaded) == said_of(draft) == ({1e-6}, 1e4)
    tensors["embed_tokens.weight"][0] += 1
    save_file(tensors, weights)
    with pytest.raises(InputError, match=r"embed_tokens\.weight is the draft's own"):
        type(draft).load(tmp_path, target)


@pytest.mark.parametrize("non_causal", [True, False])
def test_what_engines_read_first(non_causal: bool, tiny_target: Target, tmp_path: Path) -> None:
    """`is_causal` and the inner block_size, before what says the same elsewhere; SGLang and z-lab's
    code read no other word for whether slots see those after them."""
    draft, target = draft_of("sliding", tiny_target)
    draft.config.sliding_window_non_causal = non_causal
    draft.write(tmp_path, target, TINY.path, torch.float32)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.get("is_causal") == config["dflash_config"].get("causal")
    assert config.get("is_causal") == (False if non_causal else None)
    if non_causal:
        config["dflash_config"].update(causal=True, block_size=4)
        file.write_text(json.dumps(config))
        read = type(draft).load(tmp_path, target).config
        assert read.sliding_window_non_causal and read.block_size == 4


def of_model_optimizer(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """An EAGLE-3 as NVIDIA's tool writes it: no engine reads t2d."""
    del config["eagle_aux_hidden_state_layer_ids"]
    tensors.pop("t2d", None)
    config["eagle_config"] |= {
        "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True,
        "use_mtp_layernorm": False, "next_layer_regular": True, "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1, "norm_before_fc": None,
    }  # fmt: skip


def of_older_vllm(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """P-EAGLE's mask by another name and shape."""
    config |= {"pard_token": config.pop("mask_token_id"), "ptd_token_id": None}
    tensors["mask_hidden"] = tensors["mask_hidden"].view(1, -1)


def norm_inside(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Engines look there first."""
    config["eagle_config"]["norm_before_fc"] = config.pop("norm_before_fc")


def anchor_unsaid(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Engines take a DSpark for one that says the first token at its anchor."""
    del config["sample_from_anchor"], config["dspark_bonus_anchor"]


@pytest.mark.parametrize(
    ("name", "respell"),
    [
        ("eagle3", of_model_optimizer), ("whole", of_model_optimizer), ("peagle", of_older_vllm),
        ("peagle", norm_inside), ("dspark", anchor_unsaid),
    ],
)  # fmt: skip
def test_others_spellings_are_the_same_draft(
    name: str,
    respell: Callable[[dict[str, Any], dict[str, Any]], None],
    tiny_target: Target,
    tmp_path: Path,
) -> None:
    draft, target = draft_of(name, tiny_target)
    draft.write(tmp_path, target, TINY.path, torch.float32)
    file, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    respell(config, tensors)
    file.write_text(json.dumps(config))
    save_file(tensors, weights)
    loaded = type(draft).load(tmp_path, target)
    assert same_weights(loaded, draft)
    assert loaded.written(target, "") == draft.written(target, "")


@pytest.mark.parametrize("entry", ["d2t", "t2d"])
def test_a_vocabulary_of_another_size(entry: str, tiny_target: Target, tmp_path: Path) -> None:
    draft, target = draft_of("eagle3", tiny_target)
    draft.write(tmp_path, target, TINY.path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    if entry == "d2t":
        tensors["d2t"] = draft.d2t[:-1].clone()
        tensors["t2d"][draft.draft_ids_D[-1]] = False
    else:
        tensors["t2d"] = torch.cat([draft.t2d, torch.zeros(1, dtype=torch.bool)])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"{entry} is missing or is not .*vocab_size=.* long"):
        type(draft).load(tmp_path, target)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_a_draft(cfg: Config, missing: str, tmp_path: Path) -> None:
    """from= names what it needs."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=r"is no folder .* with config\.json and one model\.safe"):
        converted(cfg, str(tmp_path))


def places(node: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where entries stand, at any depth."""
    inside = [p for k, v in node.items() if isinstance(v, dict) for p in places(v, (*above, k))]
    return [(*above, name) for name in node] + inside


OTHER_TYPES = ["1,2", ["a"], [None], {"a": 1}, [], -1, 0, 1.5, True, 10**30]


@pytest.mark.slow
@pytest.mark.parametrize("drafted", [None, 4])
@pytest.mark.parametrize("name", KINDS)
def test_an_entry_of_another_type(
    name: str, drafted: int | None, tiny_target: Target, tmp_path: Path
) -> None:
    """It is read or refused by name, whichever entry it is, and whatever it is."""
    draft, target = draft_of(name, tiny_target)
    draft.write(tmp_path, target, TINY.path, torch.float32, drafted)
    file = tmp_path / "config.json"
    text = file.read_text()
    for *above, last in [*places(json.loads(text)), ("rope_scaling",), ("layer_types",)]:
        for other in OTHER_TYPES:
            config = json.loads(text)
            node = config
            for key in above:
                node = node[key]
            node[last] = other
            file.write_text(json.dumps(config))
            try:
                type(draft).load(tmp_path, target)
            except InputError as error:
                assert str(tmp_path) in str(error) or "target" in str(error), error


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("eagle3", "eagle_aux_hidden_state_layer_ids", "1,2,3"), ("eagle3", "eagle_config", [1]),
        ("eagle3", "num_attention_heads", "4"), ("dflash", "dflash_config", "x"),
        ("dflash", "aux_hidden_state_layer_ids", "1"), ("dflash", "rms_norm_eps", "1e-6"),
        ("peagle", "mask_token_id", [7]), ("dspark", "rope_scaling", "linear"),
    ],
)  # fmt: skip
def test_text_for_numbers(
    name: str, entry: str, value: Any, tiny_target: Target, tmp_path: Path
) -> None:
    draft, target = draft_of(name, tiny_target)
    draft.write(tmp_path, target, TINY.path, torch.float32)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
    with pytest.raises(InputError, match=rf"config\.json: {entry}=.* is not a"):
        type(draft).load(tmp_path, target)
    file.write_text("[1]")
    with pytest.raises(InputError, match=r"config\.json is no object"):
        type(draft).load(tmp_path, target)
