"""The EAGLE-3 objective as its formulas read: dense, one conversation at a time, by autograd.

Every (slot, step) pair is computed whether it counts or not, attention is a masked softmax over
all step-0 keys and the slot's own later ones, and logits exist for everything.

Shape suffixes: S slots, T tokens, N query heads, M key-value heads, E head size, K steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_exp.config import LossConfig
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.losses import TeacherRows, acceptance_rate, opd
from specforge_exp.training.objective import Sample


def teacher_rows(logits_ND: Tensor, log_z_N: Tensor, temperature: float = 1.0) -> TeacherRows:
    """Teacher rows from the target's logits.

    Args:
        logits_ND: the target's logits at the draft's tokens, not divided by the temperature.
        log_z_N: logsumexp of the target's logits / temperature over its full vocabulary.
        temperature: of the comparison.
    """
    scaled_ND = logits_ND.float() / temperature
    log_z_draft_N = torch.logsumexp(scaled_ND, -1)
    return TeacherRows(scaled_ND - log_z_draft_N[:, None], log_z_draft_N - log_z_N)


def dense_attention(q_SNE: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Softmax over the causal step-0 keys and the slot's own keys; [S, N, E]."""
    S, N, E = q_SNE.shape
    keys, values = ([x.repeat_interleave(N // x.shape[1], 1) for x in xs] for xs in (keys, values))
    scores = torch.einsum("sne,tne->nst", q_SNE, keys[0]) * E**-0.5
    scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf"))
    own = [(q_SNE * k_SNE).sum(-1).T[..., None] * E**-0.5 for k_SNE in keys[1:]]
    weights = torch.softmax(torch.cat([scores, *own], -1), -1)
    out_SNE = torch.einsum("nst,tne->sne", weights[..., :S], values[0])
    for step, v_SNE in enumerate(values[1:]):
        out_SNE = out_SNE + weights[..., S + step].T[..., None] * v_SNE
    return out_SNE


def dense_unroll(draft: Eagle3, ids_T: Tensor, aux_TA: Tensor, steps: int) -> list[Tensor]:
    """Un-normed states [T, H] of every slot at every step."""
    T = len(ids_T)
    tokens = F.pad(ids_T[1:], (0, steps))
    positions = torch.arange(T)
    state_1TH = draft.fc(aux_TA)[None]
    states, keys, values = [], [], []
    for step in range(steps):
        q, k, v = draft.project(tokens[None, step : step + T], state_1TH, positions[None] + step)
        keys.append(k[0])
        values.append(v[0])
        attended = dense_attention(q[0], keys, values)
        state_1TH = draft.finish(state_1TH, attended.flatten(1)[None])
        states.append(state_1TH[0])
    return states


def counted(turns: list[int], slot: int, step: int) -> bool:
    """Tokens slot + 1 and slot + 2 + step exist and belong to one assistant turn."""
    if slot + 2 + step >= len(turns):
        return False
    return turns[slot + 1] > 0 and turns[slot + 1] == turns[slot + 2 + step]


def reference(
    draft: Eagle3,
    sample: Sample,
    head_VH: Tensor,
    cfg: tuple[Eagle3Config, LossConfig],
    window_K: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and sums of the `inference` supervision, to be differentiated by autograd."""
    draft_cfg, loss_cfg = cfg
    steps = draft_cfg.ttt_length
    total = torch.zeros(())
    sums: dict[str, Tensor] = {}
    tensors = (sample.ids_T, sample.turns_T, sample.aux_TA, sample.last_TH)
    for ids, turns, aux, last in zip(*(x.split(sample.lengths) for x in tensors), strict=True):
        states = dense_unroll(draft, ids, aux, steps)
        alphas: list[dict[int, Tensor]] = []
        for step, state_TH in enumerate(states):
            slots = [s for s in range(len(ids)) if counted(turns.tolist(), s, step)]
            logits = draft.lm_head(draft.norm(state_TH[slots]))
            full = last[[s + 1 + step for s in slots]] @ head_VH.T
            raw = full[:, draft.draft_ids_D]
            scaled = torch.logsumexp(full / loss_cfg.temperature, -1)
            rows = opd(logits, teacher_rows(raw, scaled, loss_cfg.temperature), loss_cfg)
            weight = draft_cfg.ttt_decay**step / max(1.0, float(window_K[step]))
            total = total + weight * rows.loss_N.sum()
            plain = teacher_rows(raw, torch.logsumexp(full, -1))
            alpha = acceptance_rate(torch.log_softmax(logits, -1), plain).detach()
            alphas.append(dict(zip(slots, alpha, strict=True)))
            top1 = draft.draft_ids_D[logits.argmax(-1)] == full.argmax(-1)
            found = {**rows.parts, "alpha": alpha, "top1": top1, "rows": torch.ones(len(slots))}
            for name, value in found.items():
                sums.setdefault(name, torch.zeros(steps))[step] += value.sum()
        for slot in alphas[-1]:
            chain = torch.stack([alpha[slot] for alpha in alphas])
            sums["length"] = sums.get("length", 0) + 1 + chain.cumprod(0).sum()
            sums["length_slots"] = sums.get("length_slots", torch.zeros(())) + 1
    return total, sums
