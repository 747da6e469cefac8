"""What is measured of a target's parts, and what is refused of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import BASE, FAMILIES, HEADS, YARN, build, save

from specforge_exp.config import ModelConfig
from specforge_exp.errors import InputError
from specforge_exp.target import Target, load_target
from specforge_exp.target.segments import check_segments


@pytest.mark.parametrize("family", ["Llama 2", "Qwen3-MoE"])
def test_flops_count_what_a_token_visits(family: str) -> None:
    """Two of four experts; no norm, embedding or head."""
    target = Target(build(FAMILIES[family]()), [0])
    weights = [w for layer in target.layers for w in layer.parameters()]
    matrices, experts = (sum(w.numel() for w in weights if w.dim() == d) for d in (2, 3))
    assert target.parameters == matrices + experts / 2
    assert (experts > 0) == (family == "Qwen3-MoE")


def test_states_of_several_streams_are_refused(tmp_path: Path) -> None:
    """Gemma 3n's layers give four states of a token."""
    config = tf.Gemma3nTextConfig(
        **HEADS, hidden_size_per_layer_input=8, vocab_size_per_layer_input=320, laurel_rank=4,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"] * 4,
    )  # fmt: skip
    model = ModelConfig(name="t", path=str(save(config, tmp_path)), aux_layers=[1])
    with pytest.raises(InputError, match="layers of gemma3n_text do not give one state of 64"):
        load_target(model, torch.device("cpu"))


@pytest.mark.parametrize("lost", [{"mscale": 1.0, "mscale_all_dim": 1.0}, {"truncate": False}, {}])
def test_what_a_yarn_does_otherwise_is_not_copied(lost: dict[str, Any]) -> None:
    """Ministral 3's rotates without the factor that a draft's has."""
    config = tf.LlamaConfig(**BASE, rope_parameters={**YARN, **lost})
    copied = Target(build(config), [0]).last_layers(1)[0]
    assert "self_attn.o_proj.weight" in copied
    assert ("self_attn.q_proj.weight" in copied) == (not lost)


def test_more_tokens_than_a_model_counts_by_place_are_refused() -> None:
    """Proposals stand behind the whole text, whatever their positions."""
    config = FAMILIES["Llama 4 (text)"]()
    config.floor_scale = 70
    target = Target(build(config).eval().requires_grad_(False), [1])
    check_segments(target, 57)
    with pytest.raises(InputError, match=r"58 tokens and 12 proposed ones, .* from 70 on"):
        check_segments(target, 58)
