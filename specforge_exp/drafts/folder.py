"""The folder of an exported draft, config.json and model.safetensors, written and read."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_exp.errors import InputError
from specforge_exp.target.shape import ROTARY

USUAL = ("beta_fast", "beta_slow")
"""Of a rotary embedding, what transformers and engines take alike where it is left out."""
ALIKE = {
    "rope_type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim", "truncate",
    "mrope_section", "mrope_interleaved", *" ".join(ROTARY.values()).split(),
}  # fmt: skip
"""And what they take alike of text where it is there: vLLM reads yarn's attention_factor, SGLang
its attn_factor, neither the other's."""

TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "an object": (
        lambda value: isinstance(value, dict),
        "eagle_config dflash_config rope_scaling rope_parameters transformer_layer_config "
        "speculators_config verifier",
    ),
    "a whole number above 0": (
        lambda value: type(value) is int and 0 < value < 2**31,
        "hidden_size num_attention_heads num_key_value_heads num_hidden_layers head_dim vocab_size "
        "intermediate_size draft_vocab_size target_hidden_size block_size markov_rank "
        "max_position_embeddings num_target_layers sliding_window",
    ),
    "a token": (lambda value: type(value) is int, "mask_token_id pard_token ptd_token_id"),
    "a number above 0": (
        lambda value: type(value) in (int, float) and 0 < value < 1e18, "rope_theta factor"
    ),
    "a fraction": (lambda value: isinstance(value, float) and value > 0, "rms_norm_eps"),
    "a list of layers": (
        lambda value: isinstance(value, list) and all(type(layer) is int for layer in value),
        "eagle_aux_hidden_state_layer_ids aux_hidden_state_layer_ids target_layer_ids",
    ),
    "a list of words": (
        lambda value: isinstance(value, list) and all(isinstance(kind, str) for kind in value),
        "layer_types",
    ),
    "a word": (lambda value: isinstance(value, str), "rope_type type model_type hidden_act"),
}  # fmt: skip
"""What entries of a config.json are, if they are there: how that is seen, and their names."""


def write_export(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Write config.json and model.safetensors into an existing folder.

    Args:
        folder: where to.
        config: for config.json; the dtype is added.
        tensors: those that are not whole numbers are rounded.
        dtype: what to.
    """
    name = str(dtype).removeprefix("torch.")
    text = json.dumps({**config, "dtype": name, "torch_dtype": name}, indent=2)
    (folder / "config.json").write_text(text + "\n")
    rounded = {
        key: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for key, value in tensors.items()
    }
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})


def rope_spellings(config: Any) -> dict[str, Any]:
    """The rotary embedding as rope_parameters, and as rope_theta with rope_scaling."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "rope_theta": theta,
        "rope_scaling": rope if scaled else None,
        "rope_parameters": dict(config.rope_parameters),
    }


def usual_entries(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json with what makers leave out where it is as usual; one spelling of the rotary
    embedding, as of `rotary`."""
    check_keys(folder, config, ("hidden_size", "num_attention_heads"))
    heads = config["num_attention_heads"]
    usual = {
        "num_hidden_layers": 1, "num_key_value_heads": heads, "rms_norm_eps": 1e-6,
        "head_dim": config["hidden_size"] // heads,
    }  # fmt: skip
    given = {name: value for name, value in config.items() if value is not None}
    return {**config, **usual, **given, "rope_parameters": rotary(folder, config)}


def rotary(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding of a config.json in any spelling, as rope_parameters.

    Raises:
        InputError: two spellings mean two, or engines do not compute it alike at every length.
    """
    base = {"rope_type": "default", "rope_theta": config.get("rope_theta") or 10000.0}
    spelt = []
    for name in ("rope_parameters", "rope_scaling"):
        given = {key: value for key, value in (config.get(name) or {}).items() if value is not None}
        kind = given.setdefault("rope_type", given.get("type", "default"))
        if given.get("type") in (kind, "mrope"):  # another one is refused below
            del given["type"]
        spelt += [{**base, **given}] if config.get(name) else []
    rope = spelt[0] if spelt else base
    if any(other != rope for other in spelt):
        raise InputError(
            f"{folder}/config.json: rope_parameters={config['rope_parameters']} and rope_scaling="
            f"{config['rope_scaling']} are two rotary embeddings; leave the draft's own"
        )
    kind, odd = rope["rope_type"], [name for name in rope if rope[name] and name not in ALIKE]
    if kind not in ROTARY or odd or rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(
            f"{folder}/config.json: of the rotary embedding {rope} engines compute different "
            f"drafts, or another one from some length on; known: {', '.join(ROTARY)}, of whole "
            "heads, the same in all layers"
        )
    if missing := [name for name in ROTARY[kind].split() if name not in {*rope, *USUAL}]:
        raise InputError(
            f"{folder}/config.json: the rotary embedding {rope} has no {', '.join(missing)}"
        )
    return rope


def read_export(folder: Path, keys: Iterable[str] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of an exported draft.

    Args:
        folder: of the draft.
        keys: as in `check_keys`.

    Raises:
        InputError: a file cannot be read, a key is missing, or an entry is of another type.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read as an exported draft: {error}") from None
    check_types(folder, config)
    check_keys(folder, config, keys)
    return config, tensors


def check_types(folder: Path, config: Any) -> None:
    """Refuse a config.json with an entry, at any depth, that is not what readers take it for."""
    if not isinstance(config, dict):
        raise InputError(f"{folder}/config.json is no object")
    for name, value in config.items():
        for what, (right, names) in TYPES.items():
            if name in names.split() and value is not None and not right(value):
                raise InputError(f"{folder}/config.json: {name}={json.dumps(value)} is not {what}")
        if isinstance(value, dict):
            check_types(folder, value)


def check_keys(folder: Path, config: dict[str, Any], keys: Iterable[str]) -> None:
    """Refuse a config.json that lacks one of these; `a.b` is b within a."""
    for key in keys:
        node: Any = config
        for name in key.split("."):
            if not isinstance(node, dict) or name not in node:
                raise InputError(f"{folder}/config.json has no {key}")
            node = node[name]


def check_mask(folder: Path, token: Any, vocabulary: int) -> None:
    """Refuse a mask token that no row of the embeddings stands for."""
    if not isinstance(token, int) or not 0 <= token < vocabulary:
        raise InputError(
            f"{folder}/config.json: mask_token_id={token} is none of the tokens 0..{vocabulary - 1}"
        )


def check_target(
    folder: Path, pairs: dict[str, tuple[Any, Any]], path: str = "", remedy: str = ""
) -> None:
    """Refuse a draft of another target.

    Args:
        folder: of the draft.
        pairs: by name, what the draft was made for and what the target has.
        path: of the target it was made for, in brackets.
        remedy: what else may help.
    """
    for name, (expected, actual) in pairs.items():
        if expected != actual:
            raise InputError(
                f"{folder} was made for another target{path}: its {name} is {expected}, this "
                f"target's is {actual}{remedy}"
            )


def check_tensors(folder: Path, expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Refuse missing, superfluous and misshapen tensors: engines skip them silently."""
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems)}")
