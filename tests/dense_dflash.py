"""DFlash as its description reads: one dense mask over context and blocks, plain autograd."""

from math import prod

import torch
import torch.nn.functional as F
from reference import teacher_rows
from torch import Tensor

from specforge_exp.config import LossConfig
from specforge_exp.drafts.chain_attention import rotate
from specforge_exp.drafts.dflash.blocks import make_blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.drafts.dflash.training import decays
from specforge_exp.losses import acceptance_rate, opd
from specforge_exp.training.objective import Sample


def dense_states(draft: DFlash, sample: Sample, anchors: Tensor, slots: int) -> Tensor:
    """Normed states [R, S, H] of the blocks of one conversation."""
    T, R = len(sample.ids_T), len(anchors)
    E = draft.config.head_dim
    block_Q = torch.arange(R).repeat_interleave(slots)
    at_Q = anchors[block_Q] + torch.arange(slots).repeat(R)
    context = draft.hidden_norm(F.linear(sample.aux_TA, draft.fc.weight))
    ids = torch.full((R, slots), draft.config.mask_token_id)
    ids[:, 0] = sample.ids_T[anchors]
    h = F.embedding(ids.flatten(), draft.embed_VH)
    before = torch.arange(T)[None] < anchors[block_Q][:, None]
    own = block_Q[:, None] == block_Q[None]
    full, sliding = torch.cat([before, own], 1), torch.cat([before, own], 1)
    if window := draft.config.sliding_window:
        last_Q = at_Q if draft.config.window == "slot" else anchors[block_Q] - 1
        near = last_Q[:, None] - torch.arange(T)[None] < window
        if not draft.config.sliding_window_non_causal:
            own = own & (at_Q[:, None] >= at_Q[None])
        sliding = torch.cat([before & near, own], 1)
    at = torch.cat([torch.arange(T), at_Q])
    for layer, kind in zip(draft.layers, draft.config.layer_types, strict=True):
        mask = sliding if kind == "sliding_attention" else full
        attn = layer.self_attn
        x = layer.input_layernorm(h)
        both = torch.cat([context, x])
        q = attn.q_norm(F.linear(x, attn.q_proj.weight).unflatten(-1, (-1, E)))
        k = attn.k_norm(F.linear(both, attn.k_proj.weight).unflatten(-1, (-1, E)))
        v = F.linear(both, attn.v_proj.weight).unflatten(-1, (-1, E))
        q = rotate(q, *draft.angles(at_Q, h)).transpose(0, 1)[None]
        k = rotate(k, *draft.angles(at, h)).transpose(0, 1)[None]
        v = v.transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        h = h + F.linear(out[0].transpose(0, 1).flatten(1), attn.o_proj.weight)
        y = layer.post_attention_layernorm(h)
        gate, up = F.linear(y, layer.mlp.gate_proj.weight), F.linear(y, layer.mlp.up_proj.weight)
        h = h + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)
    return draft.norm(h).unflatten(0, (R, slots))


def expected_lengths(q_RKV: Tensor, labels: list[list[int]], alpha: float) -> Tensor:
    """D-PACE's weights [K, R] of the labels of every block that count, one by one."""
    weight_KR = torch.zeros(q_RKV.shape[1], len(labels))
    for r, tokens in enumerate(labels):
        reached = [alpha + (1 - alpha) * float(q_RKV[r, k, t]) for k, t in enumerate(tokens)]
        for k in range(len(tokens)):
            weight_KR[k, r] = sum(prod(reached[: i + 1]) for i in range(k, len(tokens)))
    return weight_KR


def dense_objective(
    draft: DFlash,
    sample: Sample,
    head_VH: Tensor,
    cfg: tuple[DFlashConfig, LossConfig],
    window_K: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and sums, conversation by conversation, to be differentiated by autograd."""
    draft_cfg, loss_cfg = cfg
    K = draft_cfg.steps
    blocks = make_blocks(draft_cfg, sample)
    weight_K = decays(draft_cfg) / (decays(draft_cfg) * window_K).sum()
    total, first = torch.zeros(()), 0
    sums: dict[str, Tensor] = {}
    for length in sample.lengths:
        part = slice(first, first + length)
        here = (blocks.anchor_R >= first) & (blocks.anchor_R < first + length)
        anchors = blocks.anchor_R[here] - first
        alone = Sample(
            sample.ids_T[part], sample.turns_T[part], [0], [length], 0,
            sample.aux_TA[part], sample.last_TH[part],
        )  # fmt: skip
        first += length
        if not len(anchors):
            continue
        states = dense_states(draft, alone, anchors, draft_cfg.block_size)
        if draft_cfg.position_weights == "dpace":
            logq_RKV = (states[:, draft.first_slot :].detach() @ head_VH.T).log_softmax(-1)
            labels = [
                alone.ids_T[anchor + 1 : anchor + 1 + count].tolist()
                for anchor, count in zip(anchors, blocks.counts_RK[here].sum(1), strict=True)
            ]
            weight_KR = expected_lengths(logq_RKV.exp(), labels, draft_cfg.dpace_alpha)
            weight_KR = weight_KR / window_K.sum()
        else:
            weight_KR = weight_K[:, None].expand(K, len(anchors))
        alphas = torch.zeros(K, len(anchors))
        for k in range(K):
            rows = [r for r in range(len(anchors)) if blocks.counts_RK[here][r, k]]
            if not rows:
                continue
            at = anchors[rows] + k
            logits = states[rows, k + draft.first_slot] @ head_VH.T
            full = alone.last_TH[at] @ head_VH.T
            teacher = teacher_rows(full, torch.logsumexp(full, -1))
            teacher = type(teacher)(teacher.logp_ND, teacher.log_mass_N, alone.ids_T[at + 1])
            found = opd(logits, teacher, loss_cfg)
            total = total + (weight_KR[k, rows] * found.loss_N).sum()
            alpha = acceptance_rate(torch.log_softmax(logits, -1), teacher).detach()
            alphas[k, rows] = alpha
            top1 = logits.argmax(-1) == full.argmax(-1)
            ones = torch.ones(len(rows))
            for name, value in {**found.parts, "alpha": alpha, "top1": top1, "rows": ones}.items():
                sums.setdefault(name, torch.zeros(K))[k] += value.sum()
        whole = blocks.counts_RK[here].all(1)
        sums["length"] = sums.get("length", 0) + ((1 + alphas.cumprod(0).sum(0)) * whole).sum()
        sums["length_slots"] = sums.get("length_slots", 0) + whole.sum()
    return total, sums
