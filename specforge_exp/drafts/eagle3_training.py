"""The EAGLE-3 objective: which (slot, step) pairs train, on what, and how they are averaged.

Slot i at step k reads token i+1+k and the state of step k-1, and predicts token i+2+k against the
target's distribution at position i+1+k. Three ways to supervise:

    inference    token i+1 and token i+2+k belong to one assistant turn: the states that exist when
                 serving. Every step: the mean over supervised slots of the optimiser window.
    specforge    SpecForge 0.2.0: mask[i+k], and the target's best token is in the draft's
                 vocabulary; divided by all B*T positions.
    speculators  speculators 0.9.0: mask[i+1+k]; divided by the count + 1e-5; the acceptance terms
                 compare with p renormalised on the draft's vocabulary.

Steps are summed with ttt_decay**k.

Shape suffixes: B batch, T tokens, K steps, H hidden, A = 3 H, N rows, D draft vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_exp.config import DraftConfig, LossConfig
from specforge_exp.drafts.teacher import Teacher, make_teacher
from specforge_exp.losses import (
    LossFunction,
    RowLoss,
    TeacherRows,
    acceptance_rate,
    cross_entropy,
    forward_kl,
    reverse_kl,
)
from specforge_exp.training.objective import Outcome, Sample

if TYPE_CHECKING:
    from specforge_exp.drafts.eagle3 import Eagle3


def shifted(values_BT: Tensor, by: int) -> Tensor:
    """values[i + by] at i, zeros at the end."""
    return F.pad(values_BT[:, by:], (0, min(by, values_BT.shape[1])))


def turn_masks(supervision: str, turns_BT: Tensor, steps: int) -> list[Tensor]:
    """Per step the slots [B, T] that the turns alone let train (specforge drops more)."""
    masks = []
    for step in range(steps):
        if supervision == "inference":
            first, predicted = shifted(turns_BT, 1), shifted(turns_BT, step + 2)
            masks.append((first > 0) & (first == predicted))
        elif supervision == "specforge":
            masks.append(shifted(turns_BT, step) > 0)
        else:
            masks.append(shifted(turns_BT, step + 1) > 0)
    return masks


def denominators(cfg: DraftConfig, turns_BT: Tensor) -> Tensor:
    """What the sums of each step are divided by, as far as this batch goes; [K] float64.

    The divisor of an optimiser window is the sum over its batches, known before any forward.
    """
    if cfg.supervision == "specforge":
        return torch.full((cfg.ttt_length,), float(turns_BT.numel()), dtype=torch.float64)
    masks = turn_masks(cfg.supervision, turns_BT, cfg.ttt_length)
    return torch.stack([mask.sum() for mask in masks]).double()


def positions_of(mask_BT: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Batch index and target position of every supervised slot of a step: [N] each."""
    batch_N, slot_N = mask_BT.nonzero(as_tuple=True)
    return batch_N, slot_N + 1 + step


def teacher_for(
    draft: "Eagle3",
    sample: Sample,
    head: Callable[[Tensor], Tensor],
    masks: list[Tensor],
    temperature: float,
) -> Teacher:
    """The teacher at every position that some step needs.

    One position beyond the last token exists with a zero state, which is what SpecForge's shift
    leaves there; the other ways to supervise never look at it.
    """
    last_BUH = F.pad(sample.last_BTH, (0, 0, 0, 1))
    needed_BU = torch.zeros(last_BUH.shape[:2], dtype=torch.bool, device=last_BUH.device)
    for step, mask_BT in enumerate(masks):
        needed_BU[positions_of(mask_BT, step)] = True
    return make_teacher(head, last_BUH, needed_BU, draft.draft_ids_D, temperature)


def drop_unknown(masks: list[Tensor], teacher: Teacher, t2d: Tensor) -> list[Tensor]:
    """SpecForge's rule: drop slots whose target's best token the draft cannot say."""
    kept = []
    for step, mask_BT in enumerate(masks):
        known_N = t2d[teacher.top_P[teacher.index_BT[positions_of(mask_BT, step)]]]
        kept.append(mask_BT.masked_scatter(mask_BT, known_N))
    return kept


def objective(
    draft: "Eagle3",
    sample: Sample,
    head: Callable[[Tensor], Tensor],
    loss: tuple[LossFunction, LossConfig],
    cfg: DraftConfig,
    window_K: Tensor,
) -> Outcome:
    """Unroll the draft over a batch and compare it with the target at every supervised row.

    Args:
        draft: gradients go to it.
        sample: tokens and the target's states.
        head: post-norm states [N, H] -> the target's logits [N, V].
        loss: the function and its configuration; the peers' ways to supervise use the peers' own
            terms with the configuration's weights.
        cfg: steps, decay and supervision.
        window_K: sum of `denominators` over the optimiser window.
    """
    function, loss_cfg = loss
    masks = turn_masks(cfg.supervision, sample.turns_BT, cfg.ttt_length)
    teacher = teacher_for(draft, sample, head, masks, loss_cfg.temperature)
    if cfg.supervision == "specforge":
        masks = drop_unknown(masks, teacher, draft.t2d)
    tokens_BL = F.pad(sample.ids_BT[:, 1:], (0, cfg.ttt_length))
    unrolled = draft.unroll(tokens_BL, sample.aux_BTA, cfg.ttt_length, sample.valid_BT)
    divisors = window_K.tolist()
    values, sums, accepted = [], [], []
    for step, (state_BTH, mask_BT) in enumerate(zip(unrolled, masks, strict=True)):
        logits_ND = draft.lm_head(draft.norm(state_BTH[mask_BT]))
        at_N = teacher.index_BT[positions_of(mask_BT, step)]
        if cfg.supervision == "specforge":
            value, parts = specforge_step(logits_ND, teacher.rows(at_N), loss_cfg, divisors[step])
        elif cfg.supervision == "speculators":
            rows = speculators_rows(logits_ND, teacher.rows(at_N), loss_cfg)
            value, parts = rows.loss_N.sum() / (divisors[step] + 1e-5), rows.parts
        else:
            rows = function(logits_ND, teacher.rows(at_N), loss_cfg)
            value, parts = rows.loss_N.sum() / max(1, divisors[step]), rows.parts
        values.append(value)
        measured = measure(draft, logits_ND, teacher, at_N)
        accepted.append(
            torch.zeros_like(mask_BT, dtype=torch.float32).masked_scatter(
                mask_BT, measured["alpha"]
            )
        )
        sums.append({name: rows_N.sum() for name, rows_N in (parts | measured).items()})
    total = torch.stack([cfg.ttt_decay**step * value for step, value in enumerate(values)]).sum()
    stacked = {name: torch.stack([step[name] for step in sums]) for name in sums[0]}
    stacked["rows"] = torch.stack([mask_BT.sum() for mask_BT in masks])
    stacked |= simulated_length(masks, accepted)
    return Outcome(total, torch.stack(values).detach(), stacked)


@torch.no_grad()
def measure(
    draft: "Eagle3", logits_ND: Tensor, teacher: Teacher, at_N: Tensor
) -> dict[str, Tensor]:
    """Acceptance rate and top-1 agreement per row, at temperature 1, whatever the loss."""
    logq_ND = torch.log_softmax(logits_ND.float(), -1)
    alpha_N = acceptance_rate(logq_ND, teacher.plain_rows(at_N))
    top1_N = draft.draft_ids_D[logits_ND.argmax(-1)] == teacher.top_P[at_N]
    return {"alpha": alpha_N, "top1": top1_N.float()}


def simulated_length(masks: list[Tensor], accepted: list[Tensor]) -> dict[str, Tensor]:
    """Sum and count of 1 + sum_k prod_{j<=k} alpha_j over slots supervised at every step.

    The mean of products, bonus token included: what sampling from the draft would earn.
    """
    everywhere_BT = torch.stack(masks).all(0)
    alpha_NK = torch.stack(accepted, -1)[everywhere_BT]
    length_N = 1 + alpha_NK.cumprod(-1).sum(-1)
    return {"length": length_N.sum(), "length_slots": everywhere_BT.sum()}


def specforge_step(
    logits_ND: Tensor, teacher: TeacherRows, cfg: LossConfig, positions: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """SpecForge's value of one step: CE over all positions, LK by means over the mask.

    LK-lambda weighs the two by w = exp(-mean alpha); alpha uses p not renormalised.
    """
    logq_ND = torch.log_softmax(logits_ND.float() / cfg.temperature, -1)
    parts = {"ce": cross_entropy(logq_ND, teacher)}
    ce = parts["ce"].sum() / positions
    count = max(len(logits_ND), 1e-8)
    alpha_N = acceptance_rate(logq_ND, teacher)
    value = cfg.lambda_ce * ce
    if cfg.lambda_lk_alpha:
        value = value - cfg.lambda_lk_alpha * alpha_N.clamp(min=1e-8).log().sum() / count
    if cfg.lambda_lk:
        mean_alpha = alpha_N.sum() / count
        weight = (-mean_alpha.detach()).exp()
        value = value + cfg.lambda_lk * (weight * ce + (1 - weight) * (1 - mean_alpha))
    return value, {name: rows_N.detach() for name, rows_N in parts.items()}


def speculators_rows(logits_ND: Tensor, teacher: TeacherRows, cfg: LossConfig) -> RowLoss:
    """speculators' terms, all against p~: forward KL, reverse KL, TV and -log max(alpha, 1e-5)."""
    logq_ND = torch.log_softmax(logits_ND.float() / cfg.temperature, -1)
    local = replace(teacher, log_mass_N=torch.zeros_like(teacher.log_mass_N))
    alpha_N = acceptance_rate(logq_ND, local)
    terms = {
        "kl": (cfg.lambda_ce, forward_kl(logq_ND, local)),
        "reverse_kl": (cfg.lambda_rkl, reverse_kl(logq_ND, local)),
        "tv": (cfg.lambda_tv, 1 - alpha_N),
        "lk_alpha": (cfg.lambda_lk_alpha, -alpha_N.clamp(min=1e-5).log()),
    }
    used = {name: term for name, term in terms.items() if term[0] > 0}
    total_N = sum((weight * value_N for weight, value_N in used.values()), 0 * alpha_N)
    return RowLoss(total_N, {name: value_N.detach() for name, (_, value_N) in used.items()})
