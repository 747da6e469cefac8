"""The folder that SGLang and vLLM load: config.json and model.safetensors.

Tensor names are those of published EAGLE-3 drafts; embeddings are the target's and not saved.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from specforge_exp.drafts.vocabulary import check_mapping
from specforge_exp.errors import InputError
from specforge_exp.target import Target

if TYPE_CHECKING:
    from specforge_exp.drafts.eagle3.model import Eagle3

KEYS = (
    "target_hidden_size draft_vocab_size vocab_size hidden_size intermediate_size head_dim "
    "num_attention_heads num_key_value_heads rms_norm_eps rope_parameters max_position_embeddings"
).split()
LAYERS = ("eagle_config.eagle_aux_hidden_state_layer_ids", "target_model_name_or_path")


def export_config(draft: "Eagle3", target: Target, target_path: str, dtype: str) -> dict[str, Any]:
    """config.json as serving engines read it.

    The rotary embedding is written in both spellings (rope_parameters, and rope_theta with
    rope_scaling), and the maximum length is the target's own: engines that read a shorter one
    cut the draft's positions and its accepted length with it.
    """
    config = draft.config
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    text = target.model.config.get_text_config()
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.target_hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": rope if scaled else None,
        "rope_parameters": dict(config.rope_parameters),
        "max_position_embeddings": text.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "num_aux_hidden_states": 3,
        # vLLM reads the number of the layer whose input it takes, SGLang (in eagle_config) that of
        # the layer whose output it takes.
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in target.aux_layers],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(target.aux_layers),
            "use_aux_hidden_state": True,
        },
        "target_model_name_or_path": target_path,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "pad_token_id": None,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def write_export(
    draft: "Eagle3", folder: Path, target: Target, target_path: str, dtype: torch.dtype
) -> None:
    """Write config.json and model.safetensors into an existing folder."""
    name = str(dtype).removeprefix("torch.")
    text = json.dumps(export_config(draft, target, target_path, name), indent=2)
    (folder / "config.json").write_text(text + "\n")
    tensors = {
        key: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for key, value in draft.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_export(kind: "type[Eagle3]", folder: Path, target: Target) -> "Eagle3":
    """A draft of that class from an exported folder, in fp32, checked against its target.

    Raises:
        InputError: a file is missing or broken, a tensor is missing, superfluous or of the wrong
            shape, d2t and t2d disagree, or the draft was made for another target.
    """
    config, tensors = read_export(folder, [*KEYS, *LAYERS])
    check_target(folder, config, target)
    for name in ("d2t", "t2d"):
        if name not in tensors:
            raise InputError(f"{folder}: {name} is missing")
    check_mapping(tensors["d2t"], tensors["t2d"])
    llama = LlamaConfig(num_hidden_layers=1, **{key: config[key] for key in KEYS})
    draft = kind(llama, target.embed_VH, tensors["d2t"], tensors["t2d"])
    check_tensors(folder, draft.state_dict(), tensors)
    draft.load_state_dict(tensors)
    return draft


def read_export(folder: Path, keys: Iterable[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of an exported draft.

    Args:
        folder: of the draft.
        keys: what config.json must have; `a.b` is b within a.

    Raises:
        InputError: a file cannot be read, or a key is missing.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read as an exported draft: {error}") from None
    for key in keys:
        node: Any = config
        for name in key.split("."):
            if not isinstance(node, dict) or name not in node:
                raise InputError(f"{folder}/config.json has no {key}")
            node = node[name]
    return config, tensors


def check_target(folder: Path, config: dict[str, Any], target: Target) -> None:
    """Refuse a draft whose sizes or auxiliary layers are another target's."""
    text = target.model.config.get_text_config()
    layers = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    pairs = {
        "vocab_size": (config["vocab_size"], text.vocab_size),
        "target_hidden_size": (config["target_hidden_size"], text.hidden_size),
        "auxiliary layers": (layers, target.aux_layers),
    }
    for name, (draft_has, target_has) in pairs.items():
        if draft_has != target_has:
            raise InputError(
                f"{folder} was made for another target ({config['target_model_name_or_path']}): "
                f"its {name} is {draft_has}, this target's is {target_has}; if it was not, export "
                "it again: python export.py ... export.force=true"
            )


def check_tensors(folder: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse missing, superfluous and misshapen tensors: engines skip them silently."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems)}")
