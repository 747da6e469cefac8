"""What a draft takes over from its target: weights to start from."""

import torch
from torch import Tensor, nn

from specforge_exp.target import Target


@torch.no_grad()
def start_random(draft: nn.Module) -> None:
    """Draw every matrix anew."""
    for weight in draft.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.02)


@torch.no_grad()
def copy_matching(weight: Tensor, weights: dict[str, Tensor], name: str) -> bool:
    """Copy the weight of that name, where there is one of the same shape; whether there was."""
    matches = name in weights and weights[name].shape == weight.shape
    if matches:
        weight.copy_(weights[name])
    return matches


def biases(weights: dict[str, Tensor]) -> list[str]:
    """Names of the biases of a target's layer: a draft has none to copy them to."""
    return [name for name in weights if name.endswith(".bias")]


@torch.no_grad()
def start_at_the_end(fc: nn.Linear, norm: Tensor, target: Target) -> list[str]:
    """Feed a draft the highest of the target's states alone, and end with the target's norm;
    returns what of it an RMS norm lacks."""
    H = len(norm)
    fc.weight.zero_()
    fc.weight[:, -H:] = torch.eye(H)
    weight_H, same = target.final_norm()
    norm.copy_(weight_H)
    return [] if same else ["the mean and bias of the last norm"]
