"""The folder that SGLang and vLLM load: config.json and model.safetensors.

Tensor names are those of published EAGLE-3 drafts; embeddings are the target's and not saved.
"""

from pathlib import Path
from typing import Any, TypeVar

from transformers import LlamaConfig

from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.folder import check_tensors, read_export, rope_spellings
from specforge_exp.drafts.vocabulary import check_mapping
from specforge_exp.errors import InputError
from specforge_exp.target import Target

Loaded = TypeVar("Loaded", bound=Eagle3Model)
KEYS = (
    "target_hidden_size draft_vocab_size vocab_size hidden_size intermediate_size head_dim "
    "num_attention_heads num_key_value_heads rms_norm_eps rope_parameters max_position_embeddings"
).split()
LAYERS = ("eagle_config.eagle_aux_hidden_state_layer_ids", "target_model_name_or_path")


def export_config(draft: Eagle3Model, target: Target, target_path: str) -> dict[str, Any]:
    """config.json as serving engines read it.

    The rotary embedding is written in both spellings, and the maximum length is the target's own:
    engines that read a shorter one cut the draft's positions and its accepted length with it.
    """
    config = draft.config
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
        **rope_spellings(config),
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
    }


def load_export(kind: type[Loaded], folder: Path, target: Target) -> Loaded:
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
