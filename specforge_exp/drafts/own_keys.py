"""The keys that a row of the EAGLE-3 unroll has of its own, of steps 1..k, merged into its
attention to the shared ones.

Key after key, or by `kernels` where those are used.

Shape suffixes: as in chain_attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.drafts.kernels import USED


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


def own_scores(q_RMGE: Tensor, k_JRME: Tensor) -> Tensor:
    """Scores of a row's own keys [R, M, G, J]; fp32."""
    columns = [(q_RMGE.float() * k_RME.float().unsqueeze(2)).sum(-1) for k_RME in k_JRME]
    return torch.stack(columns, -1)


def own_forward(
    out_RMGE: Tensor, lse_RMG1: Tensor, q_RMGE: Tensor, own: tuple[Tensor, Tensor]
) -> Tensor:
    """Merge a row's own keys and values into the output; the logsumexp over all."""
    k_JRME, v_JRME = own
    if out_RMGE.device.type in USED:
        from specforge_exp.drafts.kernels.own import own_attention

        own_attention(out_RMGE, lse_RMG1, q_RMGE, k_JRME, v_JRME)
        return lse_RMG1
    own_RMGJ = own_scores(q_RMGE, k_JRME)
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
    if q_RMGE.device.type in USED:
        from specforge_exp.drafts.kernels.own import own_gradients

        own_gradients([*forward], outer_RMGE, [*sums], dq_RMGE, *back)
        return
    weights_RMGJ = own_scores(q_RMGE, k_JRME).sub_(lse_RMG1).exp_()
    dtype = q_RMGE.dtype
    for j, (k_RME, v_RME) in enumerate(zip(k_JRME, v_JRME, strict=True)):
        weight = weights_RMGJ[..., j, None]
        inner = (outer_RMGE.float() * v_RME.float().unsqueeze(2)).sum(-1, keepdim=True)
        slope = (weight * (inner - delta_RMG1)).to(dtype)
        dq_RMGE.addcmul_(slope, k_RME.unsqueeze(2))
        dk_JRME[j].add_((slope * q_RMGE).sum(2))
        dv_JRME[j].add_((weight.to(dtype) * outer_RMGE).sum(2))
