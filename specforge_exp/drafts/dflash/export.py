"""The folder that SGLang loads for DFlash: config.json and model.safetensors.

Tensor names and configuration are those of published DFlash drafts: model_type qwen3, a nested
dflash_config, `num_target_layers` the target's depth; embeddings and head are the target's and not
saved. Layers are numbered from 0 by their outputs.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

from specforge_exp.drafts.eagle3.export import check_tensors, read_export
from specforge_exp.errors import InputError
from specforge_exp.target import Target

if TYPE_CHECKING:
    from specforge_exp.drafts.dflash.model import DFlash

SHAPES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim rms_norm_eps rope_parameters max_position_embeddings vocab_size"
).split()
OWN = (
    "block_size num_target_layers dflash_config.mask_token_id dflash_config.target_layer_ids"
).split()


def export_config(draft: "DFlash", target: Target, target_path: str, dtype: str) -> dict[str, Any]:
    """config.json as serving engines read it; the rotary embedding in both spellings."""
    config = draft.config
    text = target.model.config.get_text_config()
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    layers = config.num_hidden_layers
    return {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        **{name: getattr(config, name) for name in SHAPES},
        "rope_parameters": dict(config.rope_parameters),
        "rope_theta": theta,
        "rope_scaling": rope if scaled else None,
        "block_size": config.block_size,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layers),
        },
        "num_target_layers": config.num_target_layers,
        "layer_types": ["full_attention"] * layers,
        "max_window_layers": layers,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "target_model_name_or_path": target_path,
        "tie_word_embeddings": False,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def write_export(
    draft: "DFlash", folder: Path, target: Target, target_path: str, dtype: torch.dtype
) -> None:
    """Write config.json and model.safetensors into an existing folder."""
    name = str(dtype).removeprefix("torch.")
    text = json.dumps(export_config(draft, target, target_path, name), indent=2)
    (folder / "config.json").write_text(text + "\n")
    tensors = {k: v.to(dtype).contiguous().cpu() for k, v in draft.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_export(kind: "type[DFlash]", folder: Path, target: Target) -> "DFlash":
    """A draft of that class from an exported folder, in fp32, checked against its target.

    Raises:
        InputError: a file is missing or broken, a tensor is missing, superfluous or of the wrong
            shape, or the draft was made for another target.
    """
    config, tensors = read_export(folder, [*SHAPES, *OWN])
    text = target.model.config.get_text_config()
    nested = config["dflash_config"]
    wanted = {
        "hidden_size": (config["hidden_size"], text.hidden_size),
        "vocab_size": (config["vocab_size"], text.vocab_size),
        "num_target_layers": (config["num_target_layers"], text.num_hidden_layers),
        "dflash_config.target_layer_ids": (nested["target_layer_ids"], target.aux_layers),
    }
    for name, (theirs, ours) in wanted.items():
        if theirs != ours:
            raise InputError(
                f"{folder} was made for another target: its {name} is {theirs}, this target's "
                f"{ours}"
            )
    qwen3 = Qwen3Config(
        **{name: config[name] for name in SHAPES},
        attention_bias=False,
        block_size=config["block_size"],
        mask_token_id=nested["mask_token_id"],
        target_layers=nested["target_layer_ids"],
        num_target_layers=config["num_target_layers"],
    )
    draft = kind(qwen3, target.embed_VH, target.head_weight_VH)
    check_tensors(folder, draft.state_dict(), tensors)
    draft.load_state_dict(tensors)
    return draft
