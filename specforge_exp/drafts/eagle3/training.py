"""The EAGLE-3 objective: unroll the carried rows, then compare them with the target.

How the sums of a step are averaged, by `draft.supervision` (`eagle3_chains` says which rows count):

    inference    the mean over supervised slots of the optimiser window
    specforge    SpecForge 0.2.0: cross-entropy over all B*T positions; LK by means over the mask
    speculators  speculators 0.9.0: divided by the count + 1e-5; the acceptance terms compare with
                 p renormalised on the draft's vocabulary

Steps are summed with ttt_decay**k.

Shape suffixes: T tokens, R rows, K steps, H hidden, A = 3 H, D draft vocabulary.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge_exp.config import DraftConfig, LossConfig
from specforge_exp.drafts.eagle3.chains import make_chains, turn_masks
from specforge_exp.drafts.eagle3.unroll import unroll
from specforge_exp.drafts.head_loss import Heads, Tally, Weighting, attach, tally
from specforge_exp.drafts.outcome import by_conversation, reported, step_values
from specforge_exp.drafts.rows import Chains, document_bounds
from specforge_exp.errors import InputError
from specforge_exp.losses import TERMS, LossFunction, opd
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Outcome, Sample

if TYPE_CHECKING:
    from specforge_exp.drafts.eagle3.model import Eagle3


def denominators(cfg: DraftConfig, batch: Batch) -> Tensor:
    """What the sums of each step are divided by, as far as this batch goes; [K] float64.

    The divisor of an optimiser window is the sum over its batches, known before any forward.
    """
    if cfg.supervision == "specforge":
        return torch.full((cfg.ttt_length,), float(len(batch.turns_T)), dtype=torch.float64)
    _, end_T = document_bounds(batch.lengths, batch.turns_T.device)
    masks = turn_masks(cfg.supervision, batch.turns_T, end_T, cfg.ttt_length)
    return torch.stack([mask.sum() for mask in masks]).double()


def objective(
    draft: "Eagle3",
    sample: Sample,
    target_head_VH: Tensor,
    loss: tuple[LossFunction, LossConfig],
    cfg: DraftConfig,
    window_K: Tensor,
) -> Outcome:
    """Unroll the draft over packed conversations and compare it with the target.

    Args:
        draft: gradients go to it; those of its head as soon as this returns.
        sample: tokens and the target's states.
        target_head_VH: the target's output embeddings.
        loss: the function and its configuration; the peers' ways to supervise use the peers' own
            terms with the configuration's weights.
        cfg: steps, decay and supervision.
        window_K: sum of `denominators` over the optimiser window.
    """
    carried = make_chains(cfg.supervision, sample.turns_T, sample.lengths, cfg.ttt_length)
    gradient = torch.is_grad_enabled()
    states = unroll(draft, carried, sample.ids_T, sample.aux_TA)
    if loss[1].lambda_hard and not bool(draft.t2d.all()):
        raise InputError(
            "loss.lambda_hard compares with the text, whose tokens the draft must all know: "
            "it needs draft.draft_vocab_size=null"
        )
    draft_id_V = draft.t2d.cumsum(0) - 1
    next_T = draft_id_V[torch.cat([sample.ids_T[1:], sample.ids_T[:1]])].clamp(min=0)
    heads = Heads(
        draft.norm, draft.lm_head.weight, draft.draft_ids_D, target_head_VH, sample.last_TH, next_T
    )
    weigh = partial(weighting, loss, cfg, window_K.to(sample.ids_T.device))
    if cfg.supervision == "specforge" and (loss[1].lambda_lk or loss[1].lambda_lk_alpha):
        measured = weigh(tally(carried, states, heads, weigh(None), False))
    else:
        measured = weigh(None)
    found = tally(carried, states, heads, measured, gradient)
    decay_K = cfg.ttt_decay ** torch.arange(cfg.ttt_length, device=window_K.device)
    value_K = step_values(found, measured) / decay_K
    total = (value_K * decay_K).sum()
    if found.gradient_QH is not None:
        total = attach(total, found.gradient_QH, states)
    lengths_B2 = None if gradient else by_conversation(found, carried, sample.lengths)
    flops = needed_flops(draft, carried, found)
    return Outcome(total, value_K, reported(found), lengths_B2, flops)


def needed_flops(draft: "Eagle3", carried: Chains, found: Tally) -> float:
    """FLOP that forward and backward need: products only, nothing for what is computed twice.

    6 per weight and use: fc and the embedding's half of q, k, v once per position; the rest of the
    layer per carried row and step; the head per supervised row. The target's head: 2 per weight,
    once per position.
    """
    H: int = draft.config.hidden_size
    tokens = len(carried.start_T)
    attn = draft.midlayer.self_attn
    half = H * sum(len(proj.weight) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    layer = sum(weight.numel() for weight in draft.midlayer.parameters() if weight.dim() > 1)
    rows = sum(int(mask.sum()) for mask in carried.supervised)
    needed: float = (
        6.0 * tokens * (draft.fc.weight.numel() + half)
        + 6.0 * sum(carried.counts) * (layer - half)
        + 6.0 * rows * draft.lm_head.weight.numel()
        + 2.0 * found.positions * H * draft.config.vocab_size
    )
    return needed


def weighting(
    loss: tuple[LossFunction, LossConfig], cfg: DraftConfig, window_K: Tensor, first: Tally | None
) -> Weighting:
    """The weights of the terms at every step.

    Args:
        loss: the function and its configuration.
        cfg: supervision and decay.
        window_K: the window's divisors.
        first: what a first pass found; SpecForge's LK terms are means over what it counts.
    """
    function, loss_cfg = loss
    decay_K = cfg.ttt_decay ** torch.arange(cfg.ttt_length, device=window_K.device)
    if cfg.supervision == "specforge":
        return specforge_weighting(loss_cfg, decay_K / window_K, decay_K, first)
    plain_K = (decay_K / window_K.clamp(min=1)).float()
    if cfg.supervision == "speculators":
        names = {"kl": "lambda_ce", "reverse_kl": "lambda_rkl", "tv": "lambda_tv"}
        names["lk_alpha"] = "lambda_lk_alpha"
        each_K = (decay_K / (window_K + 1e-5)).float()
        used = {name: vars(loss_cfg)[key] for name, key in names.items()}
        terms = {name: weight * each_K for name, weight in used.items() if weight > 0}
        return Weighting(terms, each_K, None, loss_cfg.temperature, local=True, floor=1e-5)
    if function is not opd:
        return Weighting({}, plain_K, lambda z, rows: function(z, rows, loss_cfg),
                         loss_cfg.temperature)  # fmt: skip
    terms = {
        TERMS[key][0]: weight * plain_K for key, weight in loss_cfg.weights().items() if weight > 0
    }
    return Weighting(terms, plain_K, None, loss_cfg.temperature)


def specforge_weighting(
    cfg: LossConfig, each_K: Tensor, decay_K: Tensor, first: Tally | None
) -> Weighting:
    """SpecForge's terms: CE over all positions, LK by means over the mask.

    LK-lambda weighs the two by w = exp(-mean alpha), held constant; alpha uses p not renormalised.
    """
    terms = {"ce": cfg.lambda_ce * each_K}
    if first is not None:
        count_K = first.counted_KR.sum(1)
        mean_K = first.sums.get("alpha", torch.zeros_like(decay_K)) / count_K.clamp(min=1e-8)
        lean_K = (-mean_K).exp()
        share_K = decay_K / count_K.clamp(min=1e-8)
        if cfg.lambda_lk:
            terms["ce"] = terms["ce"] + cfg.lambda_lk * lean_K * each_K
            terms["tv"] = cfg.lambda_lk * (1 - lean_K) * share_K
        if cfg.lambda_lk_alpha:
            terms["lk_alpha"] = cfg.lambda_lk_alpha * share_K
    terms = {name: weight_K.float() for name, weight_K in terms.items()}
    return Weighting(terms, each_K.float(), None, cfg.temperature, floor=1e-8, drop_unknown=True)
