"""The parts of the EAGLE-3 objective: the weights of its rows, and what they cost.

How the sums of a step are averaged, by `draft.supervision` (`chains` says which rows count):

    inference    the mean over supervised slots of the optimiser window
    specforge    SpecForge 0.2.0: cross-entropy over all B*T positions; LK by means over the mask of
                 each forward, which weigh by its tokens
    speculators  speculators 0.9.0: divided by the count + 1e-5; the acceptance terms compare with
                 p renormalised on the draft's vocabulary

Steps are summed with ttt_decay**k.

Shape suffixes: T tokens, R rows, K steps, H hidden, A = 3 H, D draft vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from specforge_exp.config import LossConfig
from specforge_exp.drafts.eagle3.chains import turn_masks
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.model import Eagle3Model
from specforge_exp.drafts.rows import Chains, document_bounds
from specforge_exp.drafts.weighting import Weighting, weighted
from specforge_exp.losses import Loss
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Outcome


def denominators(cfg: Eagle3Config, batch: Batch) -> Tensor:
    """What the sums of each step are divided by, as far as this batch goes; [K] float64.

    The divisor of an optimiser window is the sum over its batches, known before any forward.
    """
    if cfg.supervision == "specforge":
        return torch.full((cfg.ttt_length,), float(len(batch.turns_T)), dtype=torch.float64)
    _, end_T = document_bounds(batch.lengths, batch.turns_T.device)
    masks = turn_masks(cfg.supervision, batch.turns_T, end_T, cfg.ttt_length)
    return torch.stack([mask.sum() for mask in masks]).double()


def needed_flops(draft: Eagle3Model[Any], chains: Chains) -> float:
    """FLOP that forward and backward need below the head: products only, nothing for what is
    computed twice.

    6 per weight and use: fc and the embedding's half of q, k, v once per position; the rest of a
    layer per carried row and step, of those before the last at step 0 per position.
    """
    H: int = draft.config.hidden_size
    attn = draft.midlayer.self_attn
    half = H * sum(len(proj.weight) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    layers = [sum(w.numel() for w in x.parameters() if w.dim() > 1) for x in draft.stack]
    layers[0] -= half
    tokens, rows = len(chains.start_T), sum(chains.counts)
    inner = rows - chains.counts[0] + tokens
    needed: float = tokens * (draft.fc.weight.numel() + half)
    needed += sum(layers[:-1]) * inner + layers[-1] * rows
    return 6.0 * needed


def weighting(
    loss: Loss, cfg: Eagle3Config, window_K: Tensor, tokens: int, first: Outcome | None
) -> Weighting:
    """The weights of the terms at every step.

    Args:
        loss: the function and its configuration.
        cfg: supervision and decay.
        window_K: the window's divisors.
        tokens: of the forward.
        first: of a first pass; SpecForge's LK terms are means over what it counts.
    """
    decay_K = cfg.ttt_decay ** torch.arange(cfg.ttt_length, device=window_K.device)
    if cfg.supervision == "specforge":
        return specforge_weighting(loss.cfg, decay_K / window_K, decay_K, tokens, first)
    if cfg.supervision == "speculators":
        return speculators_weighting(loss.cfg, decay_K / (window_K + 1e-5), decay_K)
    return weighted(loss, (decay_K / window_K.clamp(min=1)).float(), decay_K)


def speculators_weighting(cfg: LossConfig, scale_K: Tensor, decay_K: Tensor) -> Weighting:
    """speculators' terms, compared with p renormalised on the draft's vocabulary."""
    scale_K = scale_K.float()
    weights = {
        "kl": cfg.lambda_ce, "reverse_kl": cfg.lambda_rkl, "tv": cfg.lambda_tv,
        "lk_alpha": cfg.lambda_lk_alpha,
    }  # fmt: skip
    terms = {name: weight * scale_K for name, weight in weights.items() if weight > 0}
    return Weighting(terms, scale_K, decay_K, cfg.temperature, local=True, floor=1e-5)


def specforge_weighting(
    cfg: LossConfig, scale_K: Tensor, decay_K: Tensor, tokens: int, first: Outcome | None
) -> Weighting:
    """SpecForge's terms: CE over all positions, LK by means over the mask.

    LK-lambda weighs the two by w = exp(-mean alpha), held constant; alpha uses p not renormalised.
    """
    terms = {"ce": cfg.lambda_ce * scale_K}
    if first is not None:
        count_K = first.sums["rows"].clamp(min=1e-8)
        lean_K = (-first.sums["alpha"] / count_K).exp()
        share_K = scale_K * tokens / count_K
        if cfg.lambda_lk:
            terms["ce"] = terms["ce"] + cfg.lambda_lk * lean_K * scale_K
            terms["tv"] = cfg.lambda_lk * (1 - lean_K) * share_K
        if cfg.lambda_lk_alpha:
            terms["lk_alpha"] = cfg.lambda_lk_alpha * share_K
    terms = {name: weight_K.float() for name, weight_K in terms.items()}
    return Weighting(
        terms, scale_K.float(), decay_K, cfg.temperature, floor=1e-8, drop_unknown=True
    )
