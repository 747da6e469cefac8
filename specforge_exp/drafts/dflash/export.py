"""The folder that SGLang, vLLM and z-lab's code load for DFlash: config.json, model.safetensors.

Tensor names and configuration are those of published DFlash drafts: model_type qwen3, a nested
dflash_config, `num_target_layers` the target's depth; embeddings and head are the target's and not
saved. Layers are numbered from 0 by their outputs. Layers with a window are those of `layer_types`;
engines let their slots see what is before them unless `dflash_config.causal` is false. There is no
`auto_map`, which may name only code that lies in the folder: engines have the draft's.
"""

from pathlib import Path
from typing import Any

from transformers import Qwen3Config

from specforge_exp.drafts.dflash.model import DFlashModel
from specforge_exp.drafts.folder import check_target, rope_spellings
from specforge_exp.errors import InputError
from specforge_exp.target import Target

SHAPES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim rms_norm_eps rope_parameters max_position_embeddings vocab_size"
).split()
OWN = (
    "block_size num_target_layers dflash_config.mask_token_id dflash_config.target_layer_ids"
).split()


def export_config(draft: DFlashModel, target: Target, target_path: str) -> dict[str, Any]:
    """config.json as serving engines read it; the rotary embedding in both spellings."""
    config = draft.config
    text = target.model.config.get_text_config()
    sliding, nested = any(draft.sliding), {}
    if sliding and config.sliding_window_non_causal:
        nested["causal"] = False
    if sliding and config.window != "slot":
        nested["window"] = config.window
    if config.sample_from_anchor:
        nested["sample_from_anchor"] = True
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        **{name: getattr(config, name) for name in SHAPES},
        **rope_spellings(config),
        "block_size": config.block_size,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layers),
            **nested,
        },
        "num_target_layers": config.num_target_layers,
        "layer_types": list(config.layer_types),
        "max_window_layers": config.num_hidden_layers,
        "use_sliding_window": sliding,
        **({"sliding_window": config.sliding_window} if sliding else {}),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "target_model_name_or_path": target_path,
        "tie_word_embeddings": False,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
    }


def loaded_config(folder: Path, config: dict[str, Any], target: Target) -> Qwen3Config:
    """Shapes of an exported draft; InputError when it was made for another target."""
    text, nested = target.model.config.get_text_config(), config["dflash_config"]
    pairs = {
        "hidden_size": (config["hidden_size"], text.hidden_size),
        "vocab_size": (config["vocab_size"], text.vocab_size),
        "num_target_layers": (config["num_target_layers"], text.num_hidden_layers),
        "dflash_config.target_layer_ids": (nested["target_layer_ids"], target.aux_layers),
    }
    check_target(folder, pairs)
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    sliding = "sliding_attention" in kinds
    if sliding and not config.get("sliding_window"):
        raise InputError(f"{folder / 'config.json'}: layer_types has windows, sliding_window none")
    return Qwen3Config(
        **{name: config[name] for name in SHAPES},
        layer_types=kinds,
        use_sliding_window=sliding,
        sliding_window=config.get("sliding_window"),
        sliding_window_non_causal=nested.get("causal") is False,
        window=nested.get("window", "slot"),
        sample_from_anchor=nested.get("sample_from_anchor", False),
        attention_bias=False,
        block_size=config["block_size"],
        mask_token_id=nested["mask_token_id"],
        target_layers=nested["target_layer_ids"],
        num_target_layers=config["num_target_layers"],
    )
