"""The folder that SGLang and vLLM load: config.json and model.safetensors.

Tensor names are those of published EAGLE-3 drafts; embeddings are the target's and not saved. What
EAGLE-3.1 changes is written where it changes something, by the names that engines read.
"""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from specforge_exp.drafts.eagle3.config import Variant
from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.folder import check_target, rope_spellings
from specforge_exp.errors import InputError
from specforge_exp.target import Target

log = logging.getLogger(__name__)

SHAPES = (
    "num_hidden_layers hidden_size target_hidden_size intermediate_size num_attention_heads "
    "num_key_value_heads head_dim hidden_act rms_norm_eps"
).split()
KEYS = (
    "target_hidden_size draft_vocab_size vocab_size hidden_size intermediate_size head_dim "
    "num_attention_heads num_key_value_heads rms_norm_eps rope_parameters max_position_embeddings"
).split()
NORMS = ("norm_before_fc", "fc_norm", "norm_before_residual", "norm_output")
LAYERS = ("eagle_config.eagle_aux_hidden_state_layer_ids", "target_model_name_or_path")


def export_config(draft: Eagle3Model[Any], target: Target, target_path: str) -> dict[str, Any]:
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
        **variant_entries(draft.variant),
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


def variant_entries(variant: Variant) -> dict[str, Any]:
    """Entries of config.json for what EAGLE-3.1 changes; says which of it SGLang does not read."""
    entries: dict[str, Any] = {name: True for name in NORMS if vars(variant)[name]}
    unread = ["norm_before_residual"] if variant.norm_before_residual else []
    if variant.sliding_window is not None:
        kinds = ["full" if window is None else "sliding" for window in variant.windows]
        entries["layer_types"] = [f"{kind}_attention" for kind in kinds]
        entries |= {"sliding_window": variant.sliding_window, "use_sliding_window": True}
        unread += ["sliding_window", "layer_types"]
    if len({*variant.windows}) > 1:
        log.warning(
            "draft: vLLM 0.32 does not start with a draft of which some layers have a window and "
            "others none; without draft.full_attention_layers it does"
        )
    if unread:
        log.warning(
            "draft: vLLM reads %s; SGLang 0.5.23 does not and would draft worse: serve this draft "
            "with vLLM", " and ".join(unread),
        )  # fmt: skip
    return entries


def exported_variant(folder: Path, config: dict[str, Any]) -> Variant:
    """What an exported draft has of EAGLE-3.1.

    Raises:
        InputError: a layer sees neither all positions nor a window of them.
    """
    number = config.get("num_hidden_layers", 1)
    kinds = config.get("layer_types") or ["full_attention"] * number
    window = config.get("sliding_window") if "sliding_attention" in kinds else None
    allowed = {"full_attention", *(["sliding_attention"] if window else [])}
    if len(kinds) != number or not {*kinds} <= allowed:
        raise InputError(
            f"{folder}/config.json: layer_types={kinds} with sliding_window={window} does not "
            f"say what each of num_hidden_layers={number} sees"
        )
    full = [n for n, kind in enumerate(kinds) if kind == "full_attention"] if window else []
    norms = {name: bool(config.get(name, False)) for name in NORMS}
    return Variant(number, **norms, sliding_window=window, full_attention_layers=full)


def exported_tensors(draft: Eagle3Model[Any]) -> dict[str, Tensor]:
    """The weights by the names that engines load: of a further layer's one norm before attention
    vLLM reads input_layernorm, SGLang hidden_norm."""
    tensors = dict(draft.state_dict())
    for number in draft.layers:
        norm = tensors[f"layers.{number}.input_layernorm.weight"]
        tensors[f"layers.{number}.hidden_norm.weight"] = norm.clone()
    return tensors


def own_tensors(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `exported_tensors`; InputError where the two names have different norms."""
    for name in [name for name in tensors if name.endswith(".hidden_norm.weight")]:
        if name.startswith("layers."):
            twin = tensors.get(name.replace("hidden_norm", "input_layernorm"))
            if twin is None or not twin.equal(tensors[name]):
                raise InputError(
                    f"{folder}: {name} is not the layer's input_layernorm: vLLM and SGLang would "
                    "not compute the same"
                )
            del tensors[name]
    return tensors


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
