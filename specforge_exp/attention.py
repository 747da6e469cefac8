"""Attention of the EAGLE-3 unroll (training-time test).

Shape suffixes: B batch, S slots, N query heads, M key-value heads, G = N / M, E head size.
"""

import torch
from torch import Tensor


def rotate(x_BSNE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """Apply rotary position embeddings (the two halves of E are the pairs); keeps x's dtype."""
    half = x_BSNE.shape[-1] // 2
    turned_BSNE = torch.cat([-x_BSNE[..., half:], x_BSNE[..., :half]], -1)
    cos_BS1E, sin_BS1E = cos_BSE.unsqueeze(-2), sin_BSE.unsqueeze(-2)
    return (x_BSNE * cos_BS1E + turned_BSNE * sin_BS1E).to(x_BSNE.dtype)


def causal_bias(valid_BS: Tensor | None, slots: int, device: torch.device) -> Tensor:
    """Added to scores: -inf above the diagonal, the lowest number at keys that are padding.

    Args:
        valid_BS: nonzero where a token is real; None: everywhere.

    Returns:
        [S, S] or [B, 1, 1, S, S], fp32.
    """
    bias_SS = torch.full((slots, slots), float("-inf"), device=device).triu(1)
    if valid_BS is None:
        return bias_SS
    padding = (valid_BS == 0)[:, None, None, None, :]
    return bias_SS.expand(len(valid_BS), 1, 1, -1, -1).masked_fill(padding, torch.finfo().min)


def unroll_attention(
    q_BSNE: Tensor, keys: list[Tensor], values: list[Tensor], bias: Tensor
) -> Tensor:
    """Attention of one unroll step: every slot sees the step-0 keys and its own later ones.

    Args:
        q_BSNE: queries of the current step, rotated.
        keys: per step 0..k the rotated keys [B, S, M, E]; those of steps 1..k are seen by their
            own slot only.
        values: likewise.
        bias: from `causal_bias`, for the step-0 keys.

    Returns:
        [B, S, N * E].
    """
    B, S, N, E = q_BSNE.shape
    M = keys[0].shape[2]
    q_BMGSE = q_BSNE.view(B, S, M, N // M, E).permute(0, 2, 3, 1, 4) * E**-0.5
    key_BMES, value_BMSE = keys[0].permute(0, 2, 3, 1), values[0].transpose(1, 2)
    scores = (q_BMGSE.reshape(B, M, -1, E) @ key_BMES).view(B, M, -1, S, S).float() + bias
    own = [(q_BMGSE * k.transpose(1, 2).unsqueeze(2)).sum(-1, keepdim=True) for k in keys[1:]]
    weights = torch.softmax(torch.cat([scores, *own], -1), -1).to(q_BSNE.dtype)
    shared = weights[..., :S].reshape(B, M, -1, S) @ value_BMSE
    out_BMGSE = shared.view(B, M, -1, S, E)
    for step, value in enumerate(values[1:]):
        out_BMGSE = out_BMGSE + weights[..., S + step, None] * value.transpose(1, 2).unsqueeze(2)
    return out_BMGSE.permute(0, 3, 1, 2, 4).reshape(B, S, N * E)
