"""The folder that SGLang, vLLM and z-lab's code load for DFlash: config.json, model.safetensors.

Tensor names and configuration are those of published DFlash drafts: model_type qwen3, a nested
dflash_config, `num_target_layers` the target's depth; embeddings and head are the target's and not
saved. Layers are numbered from 0 by their outputs. Layers with a window are those of `layer_types`;
engines let their slots see what is before them unless `is_causal` is false; vLLM reads
`dflash_config.causal`, too. There is no `auto_map`, which may name only code that lies in the
folder: engines have the draft's.
"""

import logging
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, Qwen3Config

from specforge_exp.drafts.dflash.model import DFlashModel
from specforge_exp.drafts.folder import check_keys, check_mask, check_target, rope_spellings
from specforge_exp.drafts.speculators import check_known, flattened
from specforge_exp.errors import InputError
from specforge_exp.target import Target

log = logging.getLogger(__name__)

SHAPES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim rms_norm_eps rope_parameters max_position_embeddings vocab_size"
).split()
KNOWN = {
    *SHAPES, "block_size", "num_target_layers", "hidden_act", "layer_types", "sliding_window",
    "sample_from_anchor", "dspark_bonus_anchor", "draft_vocab_size", "target_hidden_size",
    "dflash_config", "is_causal",
}  # fmt: skip
SAME = "block_size mask_token_id sample_from_anchor sliding_window_non_causal window".split()
"""Options that a draft's shapes have by the same name."""
AUX = "aux_hidden_state_layer_ids"
NON_CAUSAL = "sliding_window_non_causal"
SLIDING = "sliding_attention"


def export_config(draft: DFlashModel, target: Target, target_path: str) -> dict[str, Any]:
    """config.json as serving engines read it; the rotary embedding in both spellings."""
    config = draft.config
    text = target.model.config.get_text_config()
    sliding, nested = any(draft.sliding), {}
    non_causal = sliding and config.sliding_window_non_causal
    if non_causal:
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
        **({"is_causal": False} if non_causal else {}),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "target_model_name_or_path": target_path,
        "tie_word_embeddings": False,
        "bos_token_id": getattr(text, "bos_token_id", None),
        "eos_token_id": getattr(text, "eos_token_id", None),
    }


def read_any(
    folder: Path, config: dict[str, Any], algorithm: str, own: list[str], layers: int
) -> dict[str, Any]:
    """config.json in either layout as `export_config` has it.

    Args:
        folder: of the draft.
        config: as it was read.
        algorithm: speculators' name of it.
        own: entries that only this kind has.
        layers: of its target, where the draft does not say it.

    Raises:
        InputError: it is another draft, or has what is not known here.
    """
    said = "sample_from_anchor" if own else AUX  # readers of DSpark do not agree on its absence
    config = flattened(folder, config, algorithm, said)
    top, nested = {"mask_token_id", "target_layer_ids"}, config.get("dflash_config")
    given = {name: value for name, value in config.items() if value is not None}
    causal = given.get("is_causal", (nested or {}).get("causal"))
    if AUX in given or nested is None:  # as speculators writes, or DeepSeek's DSpark
        if AUX in given and SLIDING in given.get("layer_types", ()):  # nor on this one's
            check_keys(folder, given, [NON_CAUSAL])
        ids = [layer - 1 for layer in given[AUX]] if AUX in given else given.get("target_layer_ids")
        nested = {
            "mask_token_id": given.get("mask_token_id"), "target_layer_ids": ids,
            "causal": not given.pop(NON_CAUSAL, False),
            "window": given.pop("window", "slot"),
        }  # fmt: skip
        given.pop(AUX, None)
    if causal and {*(given.get("layer_types") or kinds_of(given))} != {SLIDING}:
        raise InputError(
            f"{folder}/config.json: is_causal or dflash_config.causal is true, and a layer has no "
            "window: here its slots see those after them, in engines they would not"
        )
    if causal is not None:
        nested = {**nested, "causal": causal}
    usual_anchor = bool(own) and not given.get("dspark_bonus_anchor", False)  # of a DSpark: true
    nested = {"sample_from_anchor": usual_anchor, **nested}
    if "sample_from_anchor" in given:
        nested["sample_from_anchor"] = given["sample_from_anchor"]
    nested = {name: value for name, value in nested.items() if value is not None}
    usual = {"num_target_layers": layers, "block_size": given.get("block_size")}
    size = {"block_size": nested.pop("block_size")} if "block_size" in nested else {}
    config = {**usual, **given, **size, "dflash_config": nested}
    wanted = [*SHAPES, *own, "block_size", *(f"dflash_config.{name}" for name in sorted(top))]
    check_keys(folder, {n: v for n, v in config.items() if v is not None}, wanted)
    check_mask(folder, nested["mask_token_id"], config["vocab_size"])
    check_known(folder, config, KNOWN | top | {*own})
    inside = top | {"sample_from_anchor", "causal", "window"}
    check_known(folder, nested, inside, "dflash_config.")
    for name in ("draft_vocab_size", "target_hidden_size"):
        same = "vocab_size" if name == "draft_vocab_size" else "hidden_size"
        if config.get(name, config[same]) != config[same]:
            raise InputError(
                f"{folder}/config.json: {name}={config[name]} is not {same}={config[same]}: this "
                "draft is as wide as its target and speaks through its whole head"
            )
    return config


def as_speculators(config: dict[str, Any], own: list[str]) -> dict[str, Any]:
    """What speculators' configuration has of its own.

    speculators reads `sliding_window_non_causal` for layers with a window alone, vLLM for all: so
    it is true where there are none.
    """
    nested = config["dflash_config"]
    kinds = set(config["layer_types"])
    non_causal = SLIDING not in kinds or nested.get("causal") is False
    if len(kinds) > 1 and not non_causal:
        log.warning(
            "draft: vLLM 0.32 takes %s=false of this layout for the layers without a window too "
            "and would draft worse: serve it vLLM with export.format=sglang", NON_CAUSAL,
        )  # fmt: skip
    window = {"window": nested["window"]} if "window" in nested else {}
    return {
        "draft_vocab_size": config["vocab_size"],
        "block_size": config["block_size"],
        AUX: [layer + 1 for layer in nested["target_layer_ids"]],
        "mask_token_id": nested["mask_token_id"],
        NON_CAUSAL: non_causal,
        "sample_from_anchor": (nested | config).get("sample_from_anchor", False),
        "num_target_layers": config["num_target_layers"],
        **window,
        **{name: config[name] for name in own},
    }


def declared(config: Qwen3Config) -> dict[str, Any]:
    """The options that shapes mean, by their keys."""
    sliding = [kind == SLIDING for kind in config.layer_types]
    full = [layer for layer, slides in enumerate(sliding) if not slides]
    options = {
        "num_layers": config.num_hidden_layers,
        "num_features": len(config.target_layers),
        "sliding_window": config.sliding_window if any(sliding) else None,
        "full_attention_indices": full if any(sliding) else [],
        **{name: getattr(config, name) for name in SAME},
    }
    layers = {"model.aux_layers": list(config.target_layers)}
    return {f"draft.{name}": value for name, value in options.items()} | layers


def check_export(folder: Path, config: dict[str, Any], target: Target) -> None:
    """Refuse a draft that was made for another target."""
    text, nested = target.model.config.get_text_config(), config["dflash_config"]
    pairs = {
        "hidden_size": (config["hidden_size"], text.hidden_size),
        "vocab_size": (config["vocab_size"], text.vocab_size),
        "num_target_layers": (config["num_target_layers"], text.num_hidden_layers),
        "dflash_config.target_layer_ids": (nested["target_layer_ids"], target.aux_layers),
    }
    check_target(folder, pairs)


def kinds_of(config: dict[str, Any]) -> list[str]:
    """The kind of each layer where config.json does not list them: as transformers tells it of a
    Qwen3, by `use_sliding_window` and `max_window_layers`."""
    names = ("num_hidden_layers", "use_sliding_window", "sliding_window", "max_window_layers")
    told = Qwen3Config(**{name: config[name] for name in names if name in config})
    return list(told.layer_types)


def loaded_config(folder: Path, config: dict[str, Any]) -> Qwen3Config:
    """Shapes of an exported draft.

    Raises:
        InputError: it has layers with a window and no size of it, or of another kind.
    """
    nested = config["dflash_config"]
    kinds = config.get("layer_types") or kinds_of(config)
    sliding = SLIDING in kinds
    if len(kinds) != config["num_hidden_layers"] or not {*kinds} <= {SLIDING, "full_attention"}:
        raise InputError(
            f"{folder / 'config.json'}: layer_types={kinds} does not say which of "
            f"num_hidden_layers={config['num_hidden_layers']} layers have a window"
        )
    kind = config.get("model_type")
    switched = kind in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[kind](), "use_sliding_window")
    unused = not config.get("use_sliding_window", not switched)
    if sliding and (unused or not config.get("sliding_window")):
        raise InputError(
            f"{folder / 'config.json'}: layer_types has windows, and sliding_window has none or "
            "use_sliding_window is not true, without which a Qwen3's is null"
        )
    return Qwen3Config(
        **{name: config[name] for name in SHAPES},
        layer_types=kinds,
        use_sliding_window=sliding,
        sliding_window=config.get("sliding_window"),
        sliding_window_non_causal=sliding and nested.get("causal") is False,
        window=nested.get("window", "slot"),
        sample_from_anchor=(nested | config).get("sample_from_anchor", False),
        attention_bias=False,
        block_size=config["block_size"],
        mask_token_id=nested["mask_token_id"],
        target_layers=nested["target_layer_ids"],
        num_target_layers=config["num_target_layers"],
    )
