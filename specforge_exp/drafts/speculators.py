"""Two layouts of config.json: Hugging Face's, one flat mapping, and that of the package
speculators 0.9, in which a draft's layers, its algorithm and its verifier are apart."""

from pathlib import Path
from typing import Any

from torch import Tensor

from specforge_exp.artifacts import read_object
from specforge_exp.drafts.folder import usual_entries
from specforge_exp.errors import InputError
from specforge_exp.target import Target

MARK = "speculators_model_type"
LAYER = (
    "model_type num_hidden_layers hidden_size intermediate_size num_attention_heads "
    "num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters "
    "max_position_embeddings vocab_size layer_types sliding_window use_sliding_window "
    "max_window_layers attention_bias attention_dropout tie_word_embeddings bos_token_id "
    "eos_token_id pad_token_id"
).split()
"""What stands in transformer_layer_config."""
SILENT = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype",
    "embed_requires_grad", "eos_token_id", "id2label", "initializer_range", "label2id",
    "max_window_layers", "model_type",
    "num_anchors", "pad_token_id", "pretraining_tp", "return_dict", "rope_scaling", "rope_theta",
    "speculators_version", "target_model_name_or_path", "target_model_type", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache", "use_sliding_window",
}  # fmt: skip
"""Entries that change nothing of what a draft says."""
FALSE_COUNTS = {"is_causal", "is_neox_style", "rope_is_neox_style"}
"""Entries that engines take for true where they are left out."""


def in_speculators_layout(folder: Path) -> bool:
    """Whether an exported draft is."""
    file = folder / "config.json"
    return file.exists() and MARK in read_object(file)


def speculators_layout(
    config: dict[str, Any], own: dict[str, Any], algorithm: str, drafted: int, target: Target
) -> dict[str, Any]:
    """config.json of speculators for a draft.

    Args:
        config: in Hugging Face's layout.
        own: what speculators' configuration of this algorithm has.
        algorithm: speculators' name of it.
        drafted: tokens for each verification.
        target: its verifier.
    """
    greedy = {
        "proposal_type": "greedy", "speculative_tokens": drafted,
        "verifier_accept_k": 1, "accept_tolerance": 0.0,
    }  # fmt: skip
    verifier = {
        "name_or_path": config["target_model_name_or_path"],
        "architectures": list(getattr(target.model.config, "architectures", None) or []),
    }
    return {
        MARK: algorithm,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": algorithm,
            "proposal_methods": [greedy],
            "default_proposal_method": "greedy",
            "verifier": verifier,
        },
        "transformer_layer_config": {name: config[name] for name in LAYER if name in config},
        "tie_word_embeddings": False,
        **own,
    }


def flattened(folder: Path, config: dict[str, Any], algorithm: str, said: str) -> dict[str, Any]:
    """config.json of either layout as one mapping, with the usual entries where they are left out.

    Args:
        folder: of the draft.
        config: as it was read.
        algorithm: the one that speculators' layout has to be of.
        said: an entry that speculators' layout needs, for its readers do not agree without.

    Raises:
        InputError: it is of another algorithm or family of layers, or an entry is missing.
    """
    if MARK not in config:
        return usual_entries(folder, config)
    layer, own = config.get("transformer_layer_config"), config.get("speculators_config")
    if config[MARK] != algorithm or not isinstance(layer, dict) or not isinstance(own, dict):
        raise InputError(
            f"{folder}/config.json: {MARK}={config[MARK]} is not {algorithm}, or it has no "
            "transformer_layer_config and speculators_config; choose its draft="
        )
    if said not in config:
        raise InputError(f"{folder}/config.json has no {said}")
    nested = ("transformer_layer_config", "speculators_config", MARK)
    top = {name: value for name, value in config.items() if name not in nested}
    verifier = {"target_model_name_or_path": own.get("verifier", {}).get("name_or_path")}
    return usual_entries(folder, {**layer, **verifier, **top})


def check_known(folder: Path, config: dict[str, Any], known: set[str], where: str = "") -> None:
    """Refuse entries that may change what a draft says and are not read; InputError."""
    for name, value in config.items():
        counts = value or (value is not None and name in FALSE_COUNTS)
        if counts and name not in known | SILENT:
            raise InputError(
                f"{folder}/config.json: {where}{name}={value} is not known of this draft, and may "
                "change what it says; is it another draft="
            )
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{folder}/config.json: hidden_act={config['hidden_act']} is not silu")


def without_targets(
    folder: Path, tensors: dict[str, Tensor], shared: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors but for copies of the target's, by their names in `shared`.

    Raises:
        InputError: one is another than the target's, which is read in its place.
    """
    for name, own in shared.items():
        held = tensors.get(name)
        if held is not None and not held.equal(own.to(held.device, held.dtype)):
            raise InputError(
                f"{folder}: {name} is the draft's own and not the target's, which is read here"
            )
    left_out = {*shared, "verifier_lm_head.weight", "verifier_norm.weight"}
    return {name: value for name, value in tensors.items() if name not in left_out}
