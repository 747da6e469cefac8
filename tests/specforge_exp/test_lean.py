"""Norms and feed-forward blocks that keep less: the same numbers, and only where they are."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    OlmoConfig,
    Qwen3Config,
)

from specforge_exp.causal.lean import spare

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def small(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def replaced(model: Any) -> dict[str, int]:
    """Modules with another forward, by their kind."""
    kinds = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SIZES), {"LlamaMLP": 2, "LlamaRMSNorm": 5}),
        (Qwen3Config(**SIZES), {"Qwen3MLP": 2, "Qwen3RMSNorm": 9}),
        (LlamaConfig(**SIZES, hidden_act="gelu"), {"LlamaRMSNorm": 5}),
        (LlamaConfig(**SIZES, mlp_bias=True), {"LlamaRMSNorm": 5}),
        (Gemma2Config(**SIZES), {}),  # 1 + weight, and gelu
        (OlmoConfig(**SIZES), {"OlmoMLP": 2}),  # layer norms without weights
    ],
    ids=["llama", "qwen3", "gelu", "bias", "gemma2", "olmo"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_numbers(config: Any, expected: dict[str, int], dtype: torch.dtype) -> None:
    model = small(config)
    lean = copy.deepcopy(model)
    spare(lean)
    assert replaced(lean) == expected
    ids = torch.arange(24).view(2, 12)
    for each in (model, lean):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            each(ids, labels=ids).loss.backward()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
        assert torch.equal(model(ids).logits, lean(ids).logits)
    rel = 1e-5 if dtype == torch.float32 else 0.03
    for (name, theirs), ours in zip(model.named_parameters(), lean.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        assert float((theirs.grad - ours.grad).abs().max()) <= rel * scale, name
        assert theirs.grad.dtype == ours.grad.dtype


def test_a_copy_has_its_own_and_weights_keep_their_names() -> None:
    model = small(LlamaConfig(**SIZES))
    names = list(model.state_dict())
    spare(model)
    other = copy.deepcopy(model)
    assert list(other.state_dict()) == names
    norm = other.model.norm
    with torch.no_grad():
        norm.weight.zero_()
        assert not norm(torch.ones(1, 2, 16)).any() and model.model.norm(torch.ones(1, 2, 16)).any()


def test_without_numbers_it_is_the_same() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    spare(model)
    assert replaced(model) == {"LlamaMLP": 2, "LlamaRMSNorm": 5}


def test_it_keeps_less() -> None:
    kept = []
    for lean in (False, True):
        model = small(LlamaConfig(**SIZES))
        if lean:
            spare(model)
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.model(torch.arange(24).view(2, 12)).last_hidden_state.sum()
        kept.append(sum(size for at, size in held.items() if at not in weights))
        loss.backward()
    assert kept[1] < 0.8 * kept[0]
