"""What is measured of a target's parts, and what is refused of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import FAMILIES, HEADS, YARN, build, save
from torch import nn

from specforge_exp.config import ModelConfig
from specforge_exp.errors import InputError
from specforge_exp.target import Target, load_target
from specforge_exp.target.anatomy import (
    find_layers,
    norm_weight,
    outputs_of,
    part_weights,
    read_end,
)
from specforge_exp.target.segments import check_segments

ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")


OF_EXPERTS = {
    "Gemma 4 with experts": lambda: tf.Gemma4TextConfig(
        **HEADS, hidden_size_per_layer_input=0, layer_types=8 * ["full_attention"],
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "experts", "convolved"),
    [
        ("Llama 2", False, False),
        ("Qwen3-MoE", True, False),
        ("Gemma 4 with experts", True, False),
        ("Qwen3-Next", True, True),
    ],
)
def test_flops_count_what_a_token_visits(family: str, experts: bool, convolved: bool) -> None:
    """Two of four experts, all of a convolution; no norm, embedding or head."""
    target = Target(build({**FAMILIES, **OF_EXPERTS}[family]()), [0])
    named = [pair for layer in target.layers for pair in layer.named_parameters()]
    several = sum(w.numel() for name, w in named if w.dim() == 3 and "experts" in name)
    convolutions = sum(w.numel() for name, w in named if "conv1d" in name)
    matrices = sum(w.numel() for _, w in named if w.dim() == 2)
    assert target.parameters == matrices + several / 2 + convolutions
    assert (several > 0, convolutions > 0) == (experts, convolved)


def test_states_of_several_streams_are_refused(tmp_path: Path) -> None:
    """Gemma 3n's layers give four states of a token."""
    config = tf.Gemma3nTextConfig(
        **HEADS, hidden_size_per_layer_input=8, vocab_size_per_layer_input=320, laurel_rank=4,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"] * 4,
    )  # fmt: skip
    model = ModelConfig(name="t", path=str(save(config, tmp_path)), aux_layers=[1])
    with pytest.raises(InputError, match="layers of gemma3n_text do not give one state of 64"):
        load_target(model, torch.device("cpu"))


def test_logits_of_other_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a block that a diffusion model fills in."""
    model = build(FAMILIES["Llama 2"]())
    own = model.forward

    def twice(*args: Any, **rest: Any) -> Any:
        out = own(*args, **rest)
        out.logits = out.logits.repeat(1, 2, 1)
        return out

    monkeypatch.setattr(model, "forward", twice)
    with pytest.raises(InputError, match=r"llama is no model of next tokens: its logits are not"):
        read_end(model, find_layers(model)[0])


def test_the_layers_are_as_many_as_the_configuration_says() -> None:
    model = build(FAMILIES["Llama 2"]())
    layers = model.model.layers
    del model.model.layers
    model.model.others = nn.ModuleList([nn.Identity()])
    with pytest.raises(InputError, match="has no list of 8 layers beside its embeddings"):
        find_layers(model)
    model.model.layers = layers
    assert find_layers(model) == (model.model, "layers")


class Norm(nn.Module):
    """(x - mean, or x) / its root mean square * (w + added) + bias."""

    def __init__(self, added: float, bias: float = 0.0, mean: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 2, 6))
        self.added, self.bias, self.mean = added, bias, mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if self.mean else x
        rms = x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        return x / rms * (self.weight + self.added) + self.bias


@pytest.mark.parametrize("added", [0.0, 1.0, 0.05])
@pytest.mark.parametrize(("bias", "mean"), [(0.0, False), (0.5, False), (5e-4, False), (0.0, True)])
def test_what_a_norm_multiplies_by(added: float, bias: float, mean: bool) -> None:
    """To the last digit where it is the weight or 1 more; the same as an RMS norm without more."""
    norm = Norm(added, bias, mean)
    weight_S, same = norm_weight(norm, 6) or (torch.zeros(6), None)
    assert same == (not bias and not mean)
    rtol = 1e-5 if added == 0.05 else 0
    torch.testing.assert_close(weight_S, norm.weight.data + added, rtol=rtol, atol=1e-8)
    part = nn.ModuleDict({"norm": norm, "proj": nn.Linear(6, 6)})
    assert torch.equal(part_weights(part)["norm.weight"], weight_S)


def test_norms_without_weights() -> None:
    weight_S, same = norm_weight(nn.LayerNorm(4, elementwise_affine=False), 4) or (None, None)
    assert weight_S is not None and not same
    torch.testing.assert_close(weight_S, torch.ones(4))
    assert (norm_weight(nn.RMSNorm(4, elementwise_affine=False), 4) or (0, 0))[1]
    assert norm_weight(None, 4) is None and norm_weight(nn.Bilinear(4, 4, 1), 4) is None


def test_the_first_of_several_outputs_counts() -> None:
    """And nothing looks into a module afterwards."""
    module = nn.LSTM(3, 2)
    with outputs_of({"a": module}) as outputs:
        states, _ = module(torch.ones(4, 3))
    assert outputs["a"] is states and not module._forward_hooks


@pytest.mark.parametrize("lost", [{"mscale": 1.0, "mscale_all_dim": 1.0}, {"truncate": False}, {}])
def test_what_a_yarn_does_otherwise_is_not_copied(lost: dict[str, Any]) -> None:
    """Ministral 3's rotates without the factor that a draft's has."""
    config = tf.Qwen3Config(**HEADS, rope_parameters={**YARN, **lost})
    copied = Target(build(config), [0]).last_layers(1)[0]
    assert "self_attn.o_proj.weight" in copied
    for name in ROTATED:
        assert (f"self_attn.{name}.weight" in copied) == (not lost)


def test_what_rotates_by_pairs_or_has_three_parts_is_not_copied() -> None:
    """Cohere rotates neighbours; a layer of Falcon-H1 is a Mamba, too."""
    copied = Target(build(tf.CohereConfig(**HEADS)), [0]).last_layers(1)[0]
    assert {f"self_attn.{name}.weight" for name in ("o_proj", "v_proj")} < set(copied)
    assert not any(f"self_attn.{name}.weight" in copied for name in ROTATED)
    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    assert Target(build(tf.FalconH1Config(**HEADS, **mamba)), [0]).last_layers(1) == [{}]


def test_more_tokens_than_a_model_counts_by_place_are_refused() -> None:
    """Proposals stand behind the whole text, whatever their positions."""
    config = FAMILIES["Llama 4 (text)"]()
    config.floor_scale = 70
    target = Target(build(config).eval().requires_grad_(False), [1])
    check_segments(target, 57)
    with pytest.raises(InputError, match=r"58 tokens and 12 proposed ones, .* from 70 on"):
        check_segments(target, 58)
