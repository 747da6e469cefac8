"""What a draft takes from the configuration of its target; no family is named."""

from collections import Counter
from typing import Any

from specforge_exp.config import ModelConfig
from specforge_exp.errors import InputError
from specforge_exp.target.files import text_config

INTERMEDIATE = "intermediate_size ffn_hidden_size ffn_dim n_inner"
EPS = "rms_norm_eps layer_norm_eps norm_eps layer_norm_epsilon norm_epsilon layernorm_epsilon"
ROTARY = {
    "default": "",
    "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
    "yarn": "factor beta_fast beta_slow original_max_position_embeddings",
}
"""Rotary embeddings that every engine computes alike at every length, and what they are made of."""
LOST = ("attention_factor", "mscale", "mscale_all_dim", "truncate")
"""Of a yarn, what a draft has not: without them it multiplies, or cuts off, otherwise."""
CHANGING = ("dynamic", "longrope")
"""Those that are another one from some length on."""


def draft_shape(config: Any) -> dict[str, Any]:
    """Sizes and rotary embedding of a draft as wide as this target; keys as in Llama's config.

    Raises:
        InputError: the target has none of a size.
    """
    text = config.get_text_config()
    hidden, heads = first_of(text, "hidden_size"), first_of(text, "num_attention_heads")
    return {
        "hidden_size": hidden,
        "intermediate_size": first_of(text, INTERMEDIATE, 4 * hidden),
        "num_attention_heads": heads,
        "num_key_value_heads": first_of(text, "num_key_value_heads", heads),
        "head_dim": first_of(text, "head_dim", hidden // heads),
        "rms_norm_eps": first_of(text, EPS, 1e-6),
        "rope_parameters": draft_rotary(text),
        "max_position_embeddings": first_of(text, "max_position_embeddings"),
        "vocab_size": first_of(text, "vocab_size"),
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def first_of(text: Any, names: str, default: Any = None) -> Any:
    """The first of these attributes that is set, as most layers have it; InputError when there is
    neither one nor a default."""
    layers = each_layer(text)
    for name in names.split():
        value, _ = Counter(getattr(layer, name, None) for layer in layers).most_common(1)[0]
        if value is not None:
            return value
    if default is None:
        raise InputError(f"the target ({text.model_type}) has no {names} in its config.json")
    return default


def each_layer(text: Any) -> list[Any]:
    """The configuration as every layer has it: transformers lets some attributes differ."""
    differ = getattr(text, "per_layer_attributes", None)
    return list(text.per_layer_config) if differ else [text] * text.num_hidden_layers


def rotaries(text: Any) -> list[dict[str, Any]]:
    """The target's rotary embeddings, that of layers that see everything first."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = {kind: value for kind, value in parameters.items() if isinstance(value, dict)}
    if not nested:
        return [parameters] if parameters else []
    return [nested[kind] for kind in sorted(nested, key=lambda kind: kind != "full_attention")]


def draft_rotary(text: Any) -> dict[str, Any]:
    """The draft's rotary embedding, of whole heads: the target's as far as engines agree on it.

    One that changes with the length becomes the plain one with the same base.
    """
    theirs = (rotaries(text) or [{}])[0]
    base = theirs.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0
    kind = theirs.get("rope_type", "default")
    if kind not in ROTARY:
        kind = "default"
    made_of = {name: theirs[name] for name in ROTARY[kind].split() if theirs.get(name) is not None}
    if "original_max_position_embeddings" in ROTARY[kind]:
        longest = text.max_position_embeddings
        original = made_of.setdefault("original_max_position_embeddings", longest)
        made_of.setdefault("factor", longest / original)
    return {"rope_type": kind, "rope_theta": base, **made_of}


def rotates_alike(text: Any) -> bool:
    """Whether the draft's rotary embedding is the target's."""
    theirs = rotaries(text)
    return (
        len(theirs) == 1
        and theirs[0].get("rope_type", "default") in ROTARY
        and theirs[0].get("partial_rotary_factor", 1.0) == 1.0
        and all(theirs[0].get(name) is None for name in LOST)
    )


def turning_point(text: Any) -> int | None:
    """Tokens from which on the rotary embedding is another one, also for those before: what is in
    one forward then depends on the longest of it; None: none."""
    changing = [each for each in rotaries(text) if each.get("rope_type") in CHANGING]
    context = getattr(text, "max_position_embeddings", None)
    points = [each.get("original_max_position_embeddings", context) for each in changing]
    return min(filter(None, points), default=None)


def check_length(cfg: ModelConfig, max_length: int, option: str = "max_length") -> str | None:
    """What is to be said about conversations of this length; None: nothing.

    Args:
        cfg: the target.
        max_length: tokens.
        option: which says so.

    Raises:
        InputError: the target rotates otherwise from a shorter length on: a training, a decoder and
            an engine would then not mean the same states.
    """
    text = text_config(cfg)
    context = getattr(text, "max_position_embeddings", None)
    change = turning_point(text)
    if change and change < max_length:
        kind = next(
            kind for kind in (r.get("rope_type") for r in rotaries(text)) if kind in CHANGING
        )
        raise InputError(
            f"{option}={max_length}, but from {change} tokens on the rotary embedding of "
            f"model.path={cfg.path} ({kind}) is another one, also for the tokens before, and "
            f"engines disagree when; use {option}={change} or less"
        )
    if context is None or max_length <= context:
        return None
    return (
        f"max_length={max_length} is above the {context} positions that model.path={cfg.path} was "
        f"made for; what it says beyond them teaches the draft nonsense: max_length={context}"
    )
