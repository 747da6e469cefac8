"""The keys that a row of the EAGLE-3 unroll has of its own, of steps 1..k, merged into its
attention to the shared ones.

On a CPU key after key, in an order that stays; elsewhere by batched products over rows and heads.

Shape suffixes: as in chain_attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.drafts.layers import IN_ORDER, minus, times_in


@dataclass
class OwnKeys:
    """What the steps of a layer share: rotated keys and values of each step's own, and gradients,
    to which the steps add in the backward pass."""

    kv_2JRME: Tensor
    """Keys, then values."""
    back_2JRME: Tensor | None = None
    """Their gradients."""
    back_2TME: Tensor | None = None
    """Of the step-0 keys and values."""


def by_head(x_JRME: Tensor) -> Tensor:
    """[J, R, M, E] -> [R * M, J, E], without a copy."""
    J, R, M, E = x_JRME.shape
    return x_JRME.permute(1, 2, 0, 3).view(R * M, J, E)


def own_scores(q_RMGE: Tensor, k_JRME: Tensor) -> Tensor:
    """Scores of a row's own keys [R, M, G, J]; in order they are fp32."""
    if IN_ORDER[q_RMGE.device.type]:
        columns = [(q_RMGE.float() * k_RME.float().unsqueeze(2)).sum(-1) for k_RME in k_JRME]
        return torch.stack(columns, -1)
    scores = q_RMGE.flatten(0, 1) @ by_head(k_JRME).transpose(1, 2)
    return scores.view(*q_RMGE.shape[:3], -1)


def own_forward(out_RMGE: Tensor, lse_RMG1: Tensor, own_RMGJ: Tensor, v_JRME: Tensor) -> Tensor:
    """Merge a row's own keys into the output; the logsumexp over all."""
    if not IN_ORDER[out_RMGE.device.type]:
        log = torch.log_softmax(torch.cat([lse_RMG1, own_RMGJ], -1), -1)
        merged_RMG1 = lse_RMG1 - log[..., :1]
        shared, own = log.exp_().split([1, len(v_JRME)], -1)
        flat = out_RMGE.mul_(shared).flatten(0, 1)
        flat.baddbmm_(own.flatten(0, 1).to(flat.dtype), by_head(v_JRME))
        return merged_RMG1
    merged_RMG1 = torch.logaddexp(lse_RMG1, torch.logsumexp(own_RMGJ, -1, keepdim=True))
    out_RMGE.mul_((lse_RMG1 - merged_RMG1).exp())
    weights_RMGJ = own_RMGJ.sub_(merged_RMG1).exp_().to(out_RMGE.dtype)
    for j, v_RME in enumerate(v_JRME):
        out_RMGE.addcmul_(weights_RMGJ[..., j, None], v_RME.unsqueeze(2))
    return merged_RMG1


def own_backward(
    forward: tuple[Tensor, Tensor, Tensor],
    outer_RMGE: Tensor,
    sums: tuple[Tensor, Tensor],
    dq_RMGE: Tensor,
    back: tuple[Tensor, Tensor],
) -> None:
    """Add the gradients of q and of a row's own keys and values; arguments as `shared_backward`."""
    (q_RMGE, k_JRME, v_JRME), (lse_RMG1, delta_RMG1), (dk_JRME, dv_JRME) = forward, sums, back
    weights_RMGJ = minus(own_scores(q_RMGE, k_JRME), lse_RMG1).exp_()
    dtype = q_RMGE.dtype
    if not IN_ORDER[q_RMGE.device.type]:
        q, outer, dq = (x.flatten(0, 1) for x in (q_RMGE, outer_RMGE, dq_RMGE))
        weights = weights_RMGJ.flatten(0, 1)
        by_head(dv_JRME).baddbmm_(weights.to(dtype).transpose(1, 2), outer)
        inner = minus(outer @ by_head(v_JRME).transpose(1, 2), delta_RMG1.flatten(0, 1))
        slope = times_in(weights, inner, dtype)
        dq.baddbmm_(slope, by_head(k_JRME))
        by_head(dk_JRME).baddbmm_(slope.transpose(1, 2), q)
        return
    for j, (k_RME, v_RME) in enumerate(zip(k_JRME, v_JRME, strict=True)):
        weight = weights_RMGJ[..., j, None]
        inner = (outer_RMGE.float() * v_RME.float().unsqueeze(2)).sum(-1, keepdim=True)
        slope = (weight * (inner - delta_RMG1)).to(dtype)
        dq_RMGE.addcmul_(slope, k_RME.unsqueeze(2))
        dk_JRME[j].add_((slope * q_RMGE).sum(2))
        dv_JRME[j].add_((weight.to(dtype) * outer_RMGE).sum(2))
