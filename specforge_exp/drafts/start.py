"""What a draft takes over from its target: sizes, and weights to start from."""

from typing import Any

import torch
from torch import Tensor, nn

from specforge_exp.target import Target


def target_shapes(text: Any) -> dict[str, Any]:
    """Configuration of layers as wide as those of the target whose text configuration this is."""
    heads = text.num_attention_heads
    names = (
        "hidden_size intermediate_size num_attention_heads rms_norm_eps rope_parameters "
        "max_position_embeddings vocab_size"
    )
    return {
        **{name: getattr(text, name) for name in names.split()},
        "num_key_value_heads": getattr(text, "num_key_value_heads", heads),
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


@torch.no_grad()
def start_random(draft: nn.Module) -> None:
    """Draw every matrix anew."""
    for weight in draft.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.02)


@torch.no_grad()
def copy_matching(weight: Tensor, weights: dict[str, Tensor], name: str) -> None:
    """Copy the weight of that name, where there is one of the same shape."""
    if name in weights and weights[name].shape == weight.shape:
        weight.copy_(weights[name])


@torch.no_grad()
def start_at_the_end(fc: nn.Linear, norm: Tensor, target: Target) -> None:
    """Feed a draft the highest of the target's states alone, and end with the target's norm."""
    H = len(norm)
    fc.weight.zero_()
    fc.weight[:, -H:] = torch.eye(H)
    norm.copy_(target.final_norm_H)
