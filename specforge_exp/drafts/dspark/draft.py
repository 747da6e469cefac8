"""DSpark: DFlash's blocks, whose tokens know the one before them, and how likely they are to stand.

The loss is DFlash's over logits that the Markov head has added to, each token's with the text's
own token before it, and the cross-entropy of the confidence head against the acceptance rates that
these logits have. (arXiv 2607.05147)

Shape suffixes: T tokens, R blocks, S slots of a block, Q rows, H hidden, F rank, K places, V
vocabulary.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config

from specforge_exp.drafts.dflash.draft import DFlash, draft_config
from specforge_exp.drafts.dflash.export import export_config, loaded_config
from specforge_exp.drafts.dflash.training import decays, scales
from specforge_exp.drafts.dspark.config import DSparkConfig
from specforge_exp.drafts.dspark.decoder import DSparkDecoder
from specforge_exp.drafts.dspark.heads import ConfidenceHead, MarkovHead
from specforge_exp.drafts.head_loss import Addition
from specforge_exp.drafts.outcome import RowSums
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss
from specforge_exp.target import Head, Target
from specforge_exp.training.batches import moved
from specforge_exp.training.objective import Outcome, Sample

HEADS = "markov_rank markov_head_type enable_confidence_head confidence_head_with_markov".split()
"""What config.json says of the heads, by the names that engines read."""


class Conditioned(NamedTuple):
    """What the heads make of all slots."""

    hidden_RSH: Tensor
    """Normed states."""
    before_RSF: Tensor
    """The token before, embedded."""
    feature_RSF: Tensor
    """What `markov_w2` makes logits of."""


class DSpark(DFlash):
    """A DSpark draft."""

    algorithm: ClassVar[str] = "dspark"
    own: ClassVar[list[str]] = HEADS
    optional: ClassVar[tuple[str, ...]] = ("markov_head.", "confidence_head.")
    plain: ClassVar[Any] = DFlash

    def __init__(self, config: Qwen3Config, embed_VH: Tensor, head_VH: Tensor) -> None:
        super().__init__(config, embed_VH, head_VH)
        H, rank = config.hidden_size, config.markov_rank
        self.markov_head = MarkovHead(len(embed_VH), rank, H, config.markov_head_type)
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            read = rank if config.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(H, read)

    @classmethod
    def new(cls, target: Target, cfg: Any, mapping: dict[str, Tensor], seed: int) -> Self:
        """As `DFlash.new`; the heads have no effect at first, and learn from there."""
        draft = super().new(target, cfg, mapping, seed)
        with torch.no_grad():
            draft.markov_head.markov_w2.weight.zero_()
            for name, weight in draft.named_parameters():
                if name.endswith(".bias") or name.startswith("confidence_head."):
                    weight.zero_()
        return draft

    @staticmethod
    def shape(target: Target, cfg: Any) -> Qwen3Config:
        """As DFlash's, with the heads'."""
        config = draft_config(target, cfg)
        config.update({name: vars(cfg)[name] for name in HEADS})
        return config

    @staticmethod
    def sglang_options(chain_length: int) -> dict[str, Any]:
        """None: it was not tried with SGLang."""
        return {}

    @staticmethod
    def vllm_options(chain_length: int) -> dict[str, Any]:
        """vLLM's configuration of speculation with chains of this length, but for the folder."""
        return {"method": "dspark", "num_speculative_tokens": chain_length}

    @classmethod
    def shaped(cls, folder: Path, config: dict[str, Any]) -> Qwen3Config:
        """As DFlash's, with the heads'."""
        shape = loaded_config(folder, config)
        if config["markov_head_type"] not in ("vanilla", "gated", "rnn"):
            raise InputError(
                f"{folder / 'config.json'}: markov_head_type={config['markov_head_type']!r} is not "
                "vanilla, gated or rnn"
            )
        shape.update({name: config[name] for name in HEADS})
        return shape

    def written(self, target: Target, target_path: str) -> dict[str, Any]:
        """config.json: DFlash's, and what vLLM reads of a DSpark draft beside it; inside
        `dflash_config` vLLM refuses `sample_from_anchor` of any draft."""
        config, common = self.config, export_config(self, target, target_path)
        common["dflash_config"].pop("sample_from_anchor", None)
        return common | {
            "architectures": ["Qwen3DSparkModel"],
            **{name: getattr(config, name) for name in HEADS},
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layers),
            "sample_from_anchor": config.sample_from_anchor,
            "dspark_bonus_anchor": not config.sample_from_anchor,
        }

    def decoder(self) -> DSparkDecoder:
        """A decoder for one request."""
        return DSparkDecoder(self)

    def slots(self, state_RSH: Tensor, ids_T: Tensor, anchor_R: Tensor) -> Conditioned:
        """What the heads make of the slots of blocks at these anchors, over the text's tokens."""
        device = ids_T.device
        before_S = (torch.arange(state_RSH.shape[1]) - self.first_slot).clamp(min=0)
        at_RS = moved((anchor_R[:, None] + before_S).clamp(max=len(ids_T) - 1), device)
        hidden_RSH = self.norm(state_RSH)
        before_RSF = self.markov_head.embedded(ids_T[at_RS], hidden_RSH.dtype)
        return Conditioned(
            hidden_RSH, before_RSF, self.markov_head.features(before_RSF, hidden_RSH)
        )

    def objective(
        self, sample: Sample, target_head: Head, loss: Loss, cfg: Any, window_K: Tensor
    ) -> Outcome:
        """As `DFlash.objective`, with both heads."""
        filled = self.fill(sample, target_head, cfg)
        slots = self.slots(filled.state_RSH, sample.ids_T, filled.blocks.anchor_R)
        feature_QF = slots.feature_RSF[:, self.first_slot :].transpose(0, 1).flatten(0, 1)
        addition = Addition(feature_QF.contiguous(), self.markov_head.markov_w2.weight)
        rates: list[RowSums] = []

        def watched(sums: RowSums) -> RowSums:
            rates.append(sums)
            return sums

        outcome = self.compare(filled, loss, cfg, window_K, addition, watched)
        outcome = replace(outcome, flops=outcome.flops + self.head_flops(len(feature_QF)))
        if self.confidence_head is None:
            return outcome
        logits_RS = self.confidence_head(slots.hidden_RSH, slots.before_RSF)
        return judged(outcome, logits_RS[:, self.first_slot :].T, rates[0], cfg, window_K)

    def head_flops(self, rows: int) -> float:
        """Needed for the heads of so many rows, forward and backward."""
        weights = [w for w in self.markov_head.parameters() if w.dim() > 1]
        lookup = self.markov_head.markov_w1.weight
        return 6.0 * rows * sum(w.numel() for w in weights if w is not lookup)

    @torch.no_grad()
    def all_logits(self, cfg: Any, ids_1T: Tensor, aux_1TA: Tensor) -> Tensor:
        """As DFlash's, every slot with the text's own token before it."""
        logits_QV = super().all_logits(cfg, ids_1T, aux_1TA)
        state_QH = self.every_state(cfg, ids_1T, aux_1TA)
        anchor_R = torch.arange(1, ids_1T.shape[1])
        slots = self.slots(state_QH.unflatten(0, (-1, cfg.block_size)), ids_1T[0], anchor_R)
        weight_VF = self.markov_head.markov_w2.weight.to(state_QH.dtype)
        return logits_QV + F.linear(slots.feature_RSF.flatten(0, 1), weight_VF).float()


def judged(
    outcome: Outcome, logits_KR: Tensor, rates: RowSums, cfg: DSparkConfig, window_K: Tensor
) -> Outcome:
    """The outcome with the loss of confidences that acceptance rates teach.

    Args:
        outcome: of the blocks.
        logits_KR: of the confidences.
        rates: the acceptance rates, and which rows count.
        cfg: the draft's options.
        window_K: labels of the optimiser window at each place.
    """
    decay_K = moved(decays(cfg), logits_KR.device)
    scale_K = cfg.confidence_weight * scales(cfg, decay_K, window_K.to(logits_KR.device))
    alpha_KR, counted_KR = rates.alpha_KR.clamp(0, 1), rates.counted_KR
    value_KR = F.binary_cross_entropy_with_logits(logits_KR, alpha_KR, reduction="none")
    value_K = (value_KR * counted_KR).sum(1)
    error_KR = (torch.sigmoid(logits_KR.detach()) - alpha_KR).abs() * counted_KR
    in_steps_K = torch.ones_like(decay_K) if cfg.position_weights == "dpace" else decay_K
    return replace(
        outcome,
        loss=outcome.loss + (scale_K * value_K).sum(),
        step_loss_K=outcome.step_loss_K + (scale_K * value_K).detach() / in_steps_K,
        sums={
            **outcome.sums,
            "confidence": value_K.detach(),
            "confidence_error": error_KR.sum(1),
        },
    )
