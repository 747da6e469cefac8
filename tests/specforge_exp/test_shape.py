"""What a draft takes from the configuration of its target."""

from types import SimpleNamespace
from typing import Any

import pytest
import transformers as tf
from families import BASE, FAMILIES, LLAMA3, YARN

from specforge_exp.target.shape import draft_rotary, draft_shape, rotates_alike, turning_point

PLAIN = {"rope_type": "default", "rope_theta": 7e3}


def text(**entries: Any) -> Any:
    """A configuration of 256 positions with these entries."""
    return SimpleNamespace(**{"max_position_embeddings": 256, **entries})


@pytest.mark.parametrize(
    ("config", "inner", "groups", "eps"),
    [
        (tf.LlamaConfig(**BASE, rms_norm_eps=3e-5), 96, 2, 3e-5),
        (tf.PhiConfig(**BASE, layer_norm_eps=4e-5), 96, 2, 4e-5),
        (tf.NemotronConfig(**BASE, norm_eps=5e-5), 96, 2, 5e-5),
        (tf.GPT2Config(n_embd=64, n_head=4, layer_norm_epsilon=6e-5), 256, 4, 6e-5),
        (tf.GPT2Config(n_embd=64, n_head=4, n_inner=80), 80, 4, 1e-5),
        (tf.OPTConfig(hidden_size=64, num_attention_heads=4, ffn_dim=72), 72, 4, 1e-6),
        (FAMILIES["Gemma 3 (pictures)"](), 96, 2, 1e-6),
    ],
)
def test_sizes_by_their_many_names(config: Any, inner: int, groups: int, eps: float) -> None:
    shape = draft_shape(config)
    assert (shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]) == (64, 4, 16)
    assert (shape["intermediate_size"], shape["num_key_value_heads"]) == (inner, groups)
    assert shape["rms_norm_eps"] == eps


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 1e4}),
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_parameters": {**LLAMA3}}, LLAMA3),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 32}},
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0,
             "original_max_position_embeddings": 32},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 9e3, "factor": 2.0}},
            {"rope_type": "yarn", "rope_theta": 9e3, "factor": 2.0,
             "original_max_position_embeddings": 256},
        ),
    ],
)  # fmt: skip
def test_what_is_not_said_of_a_rotation(entries: dict[str, Any], expected: dict[str, Any]) -> None:
    assert draft_rotary(text(**entries)) == expected


@pytest.mark.parametrize(
    ("alike", "parameters"),
    [
        (True, PLAIN),
        (True, YARN),
        (True, {**PLAIN, "partial_rotary_factor": 1.0}),
        (False, {**PLAIN, "partial_rotary_factor": 0.5}),
        (False, {"rope_type": "longrope", "rope_theta": 1e4}),
        (False, {**YARN, "attention_factor": 1.0}),
        (False, {"full_attention": PLAIN, "sliding_attention": PLAIN}),
        (False, None),
    ],
)
def test_whether_a_draft_rotates_alike(alike: bool, parameters: dict[str, Any] | None) -> None:
    assert rotates_alike(text(rope_parameters=parameters)) == alike


def test_the_first_length_at_which_a_rotation_changes_counts() -> None:
    """Where it says none, that is the context."""
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    long = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert turning_point(text(rope_parameters=PLAIN)) is None
    assert turning_point(text(rope_parameters=dynamic)) == 256
    assert turning_point(text(rope_parameters={"a": dynamic, "b": long, "c": PLAIN})) == 64
