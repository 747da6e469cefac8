"""The folder that SGLang and vLLM load: config.json and model.safetensors.

Tensor names are those of published EAGLE-3 drafts; embeddings are the target's and not saved. What
EAGLE-3.1 changes is written where it changes something, by the names that engines read.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_exp.config.machine import script
from specforge_exp.drafts.eagle3.config import Variant
from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.folder import (
    check_keys,
    check_mask,
    check_target,
    read_export,
    rope_spellings,
)
from specforge_exp.drafts.speculators import check_known, flattened
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
AUX = "eagle_aux_hidden_state_layer_ids"
PLAIN = {
    "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True, "use_mtp_layernorm": False, "next_layer_regular": True,
    "parallel_draft_step": 1,
}  # fmt: skip
"""What exports of NVIDIA's Model Optimizer say in `eagle_config` where they are EAGLE-3 as it is
here: norms of the embeddings and before the head, further layers that read states alone, one head.
"""
UNUSED = "parallel_draft_heads_num_layers"
"""Of further heads, which a parallel_draft_step of 1 has not."""
MASKS = ("mask_token_id", "pard_token", "ptd_token_id")
"""Names of P-EAGLE's mask token; which of them vLLM reads first changed with its releases."""
KNOWN = {
    *SHAPES, *KEYS, *NORMS, AUX, "eagle_config", "layer_types", "sliding_window",
    "num_aux_hidden_states",
}  # fmt: skip


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
        AUX: [layer + 1 for layer in target.aux_layers],
        "eagle_config": {AUX: list(target.aux_layers), "use_aux_hidden_state": True},
        "target_model_name_or_path": target_path,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "pad_token_id": None,
        "bos_token_id": getattr(text, "bos_token_id", None),
        "eos_token_id": getattr(text, "eos_token_id", None),
    }


def variant_entries(variant: Variant) -> dict[str, Any]:
    """Entries of config.json for what EAGLE-3.1 changes."""
    entries: dict[str, Any] = {name: True for name in NORMS if vars(variant)[name]}
    if variant.sliding_window is not None:
        kinds = ["full" if window is None else "sliding" for window in variant.windows]
        entries["layer_types"] = [f"{kind}_attention" for kind in kinds]
        entries |= {"sliding_window": variant.sliding_window, "use_sliding_window": True}
    return entries


def warn_of_unread(variant: Variant) -> None:
    """Say what an engine does not read."""
    unread = ["norm_before_residual"] if variant.norm_before_residual else []
    unread += ["sliding_window", "layer_types"] if variant.sliding_window is not None else []
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
    vLLM reads input_layernorm, SGLang hidden_norm. A draft of the whole vocabulary has no mapping:
    vLLM does not start with one."""
    tensors = dict(draft.state_dict())
    if draft.config.draft_vocab_size == draft.config.vocab_size:
        del tensors["d2t"], tensors["t2d"]
    for number in draft.layers:
        norm = tensors[f"layers.{number}.input_layernorm.weight"]
        tensors[f"layers.{number}.hidden_norm.weight"] = norm.clone()
    return tensors


def own_tensors(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `exported_tensors`; InputError where the two names have different norms."""
    for name in [name for name in tensors if name.endswith(".hidden_norm.weight")]:
        if name.startswith("layers.") and not name.startswith("layers.0."):
            twin = tensors.get(name.replace("hidden_norm", "input_layernorm"))
            if twin is None or not twin.equal(tensors[name]):
                raise InputError(
                    f"{folder}: {name} is not the layer's input_layernorm: vLLM and SGLang would "
                    "not compute the same"
                )
            del tensors[name]
    return {name.replace("layers.0.", "midlayer."): value for name, value in tensors.items()}


def read_any(
    folder: Path, algorithm: str, own: tuple[str, ...], layers: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A draft in either layout, as `export_config` and the draft's own names have it.

    Args:
        folder: of the draft.
        algorithm: speculators' name of it.
        own: entries that only this kind has.
        layers: of its target, for drafts that leave out which of them they read.

    Raises:
        InputError: it is another draft, or has what is not known here.
    """
    read, tensors = read_export(folder)
    config = flattened(folder, read, algorithm, "norm_before_residual")
    said = {name: value for name, value in config.items() if value is not None}
    if "mask_token_id" in own and (masks := {said.pop(name) for name in MASKS if name in said}):
        said["mask_token_id"] = masks.pop()
        if masks:
            raise InputError(f"{folder}/config.json: {', '.join(MASKS)} are not one token")
    check_keys(folder, said, ("vocab_size", "intermediate_size", "max_position_embeddings", *own))
    if "mask_token_id" in own:
        check_mask(folder, said["mask_token_id"], said["vocab_size"])
    check_known(folder, said, KNOWN | {*own})
    nested = dict(said.get("eagle_config") or {})
    check_known(folder, nested, {AUX, UNUSED, "norm_before_fc", *PLAIN}, "eagle_config.")
    for name, plain in PLAIN.items():
        if nested.get(name) not in (None, plain):
            raise InputError(
                f"{folder}/config.json: eagle_config.{name}={nested[name]}; EAGLE-3 has {plain}"
            )
    usual = {"target_hidden_size": said["hidden_size"], "draft_vocab_size": said["vocab_size"]}
    config = {**usual, **said}
    if "norm_before_fc" in nested:  # which engines read first
        config["norm_before_fc"] = bool(nested["norm_before_fc"])
    by_input, ids = config.get(AUX), nested.get(AUX)
    if by_input and ids and [layer - 1 for layer in by_input] != ids:
        raise InputError(
            f"{folder}/config.json: {AUX}={by_input}, by which vLLM feeds the draft, does not name "
            f"the layers whose outputs eagle_config.{AUX}={ids} names, by which SGLang does"
        )
    given = ids or [layer - 1 for layer in by_input or [2, layers // 2, layers - 3]]
    config["eagle_config"] = {AUX: given, "use_aux_hidden_state": True}
    exported_variant(folder, config)
    size, vocabulary = config["draft_vocab_size"], config["vocab_size"]
    if size == vocabulary:  # there is no mapping then
        tensors.setdefault("d2t", torch.zeros(size, dtype=torch.long))
    if "d2t" in tensors and "t2d" not in tensors:  # as of Model Optimizer; no engine reads it
        ids_D = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        tensors["t2d"] = torch.isin(torch.arange(vocabulary), ids_D)
    return config, own_tensors(folder, tensors)


def as_speculators(
    config: dict[str, Any], tensors: dict[str, Tensor], own: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What speculators' configuration has of its own, and the tensors by its names."""
    entries = {name: bool(config.get(name)) for name in NORMS}
    names = (*own, "draft_vocab_size", "target_hidden_size", AUX)
    entries |= {name: config[name] for name in names}
    named = {
        name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()
        if not (".hidden_norm." in name and name.startswith("layers."))
    }  # fmt: skip
    return {**entries, "embed_requires_grad": False}, named


def check_export(folder: Path, config: dict[str, Any], target: Target) -> None:
    """Refuse a draft whose sizes or auxiliary layers are another target's."""
    text = target.model.config.get_text_config()
    layers = config["eagle_config"][AUX]
    pairs = {
        "vocab_size": (config["vocab_size"], text.vocab_size),
        "target_hidden_size": (config["target_hidden_size"], text.hidden_size),
        "auxiliary layers": (layers, target.aux_layers),
    }
    remedy = f"; if it was not, export it again: {script('export')} ... export.force=true"
    check_target(folder, pairs, f" ({config.get('target_model_name_or_path')})", remedy)
