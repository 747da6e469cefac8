"""The folder that SGLang and vLLM load: config.json and model.safetensors.

Tensor names are those of published EAGLE-3 drafts; embeddings are the target's and not saved.
"""

from pathlib import Path
from typing import Any

from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.folder import check_target, rope_spellings
from specforge_exp.target import Target

SHAPES = (
    "num_hidden_layers hidden_size target_hidden_size intermediate_size num_attention_heads "
    "num_key_value_heads head_dim hidden_act rms_norm_eps"
).split()
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
        **{name: getattr(config, name) for name in SHAPES},
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


def check_export(folder: Path, config: dict[str, Any], target: Target) -> None:
    """Refuse a draft whose sizes or auxiliary layers are another target's."""
    text = target.model.config.get_text_config()
    layers = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    pairs = {
        "vocab_size": (config["vocab_size"], text.vocab_size),
        "target_hidden_size": (config["target_hidden_size"], text.hidden_size),
        "auxiliary layers": (layers, target.aux_layers),
    }
    remedy = "; if it was not, export it again: python export.py ... export.force=true"
    check_target(folder, pairs, f" ({config['target_model_name_or_path']})", remedy)
