"""DFlash as the stages use it: made, trained, exported, loaded and asked to draft.

Shape suffixes: T tokens, S slots, R blocks, Q rows (slots of blocks), H hidden, A auxiliary states,
K labels of a block, V vocabulary.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config

from specforge_exp.drafts.dflash import blocks
from specforge_exp.drafts.dflash.blocks import Blocks, make_blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.decoder import DFlashDecoder
from specforge_exp.drafts.dflash.export import (
    as_speculators,
    check_export,
    declared,
    export_config,
    loaded_config,
    read_any,
)
from specforge_exp.drafts.dflash.model import DFlashModel
from specforge_exp.drafts.dflash.training import as_chains, needed_flops, weighting
from specforge_exp.drafts.folder import check_tensors, read_export
from specforge_exp.drafts.head_loss import Addition, Heads, head_and_loss, text_losses
from specforge_exp.drafts.outcome import RowSums
from specforge_exp.drafts.replay import ReplayChains, proposing_chains
from specforge_exp.drafts.rows import Chains, document_bounds
from specforge_exp.drafts.speculators import without_targets
from specforge_exp.drafts.start import copy_matching, start_at_the_end, start_random
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss
from specforge_exp.target import Head, Target, draft_shape
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Outcome, Replay, Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filled:
    """The blocks of packed conversations, filled."""

    blocks: Blocks
    state_RSH: Tensor
    """Un-normed states of all slots."""
    chains: Chains
    states: list[Tensor]
    """Those of the slots that say a token, [R, H] for each place."""
    heads: Heads
    flops: float
    """Needed for the states, forward and backward."""


class DFlash(DFlashModel):
    """A DFlash draft."""

    algorithm: ClassVar[str] = "dflash"
    own: ClassVar[list[str]] = []
    """Entries of config.json that only this kind has."""

    @classmethod
    def new(cls, target: Target, cfg: DFlashConfig, mapping: dict[str, Tensor], seed: int) -> Self:
        """A fresh draft in fp32; it speaks the target's whole vocabulary, `mapping` is not used."""
        torch.manual_seed(seed)
        draft = cls(cls.shape(target, cfg), target.embed_VH, target.head_weight_VH)
        draft.attention = cfg.attention
        start_random(draft)
        if cfg.start == "target":
            draft.not_copied = start_from_target(draft, target)
        return draft

    def trains_on(self, device: torch.device) -> None:
        """As `Draft.trains_on`; InputError for an attention that has no way back there."""
        if self.attention == "flex" and device.type != "cuda":
            raise InputError(
                "draft.attention=flex has gradients on CUDA alone; draft.attention=auto takes it "
                "there, and plain products elsewhere"
            )
        super().trains_on(device)

    @staticmethod
    def shape(target: Target, cfg: DFlashConfig) -> Qwen3Config:
        """See `draft_config`."""
        return draft_config(target, cfg)

    @staticmethod
    def target_layers(cfg: DFlashConfig, layers: int) -> list[int]:
        """`num_features` layers (0-based) from 1 to N - 3, evenly; the middle one if it is one.

        Raises:
            InputError: the target has too few.
        """
        number = cfg.num_features
        if layers < number + 3:
            raise InputError(
                f"the target has {layers} layers, too few for draft.num_features={number}; "
                f"at least {number + 3} are needed"
            )
        if number == 1:
            return [layers // 2]
        return [round(1 + i * (layers - 4) / (number - 1)) for i in range(number)]

    @staticmethod
    def sglang_options(chain_length: int) -> dict[str, Any]:
        """SGLang's options for blocks with so many tokens to guess; the folder comes to them."""
        return {
            "speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": chain_length + 1,
        }  # fmt: skip

    @staticmethod
    def vllm_options(chain_length: int) -> dict[str, Any]:
        """vLLM's configuration of speculation with chains of this length, but for the folder."""
        return {"method": "dflash", "num_speculative_tokens": chain_length}

    @classmethod
    def load(cls, folder: Path, target: Target) -> Self:
        """A draft from an exported folder, in fp32, checked against its target.

        Raises:
            InputError: a file is missing or broken, a tensor is missing, superfluous or of the
                wrong shape, or the draft was made for another target.
        """
        config, tensors = cls.opened(folder, len(target.layers))
        check_export(folder, config, target)
        draft = cls(cls.shaped(folder, config), target.embed_VH, target.head_weight_VH)
        tensors = without_targets(folder, tensors, draft.shared)
        check_tensors(folder, draft.state_dict(), tensors)
        draft.load_state_dict(tensors)
        return draft

    @classmethod
    def opened(cls, folder: Path, layers: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `export.read_any`."""
        config, tensors = read_export(folder)
        return read_any(folder, config, cls.algorithm, cls.own, layers), tensors

    @classmethod
    def shaped(cls, folder: Path, config: dict[str, Any]) -> Qwen3Config:
        """See `loaded_config`."""
        return loaded_config(folder, config)

    @classmethod
    def declared(cls, config: dict[str, Any]) -> dict[str, Any]:
        """As `Draft.declared`."""
        own = {f"draft.{name}": config[name] for name in cls.own}
        return declared(loaded_config(Path(), config)) | own

    @property
    def shared(self) -> dict[str, Tensor]:
        """Embeddings and head."""
        return {"embed_tokens.weight": self.embed_VH, "lm_head.weight": self.head_VH}

    def written(self, target: Target, target_path: str) -> dict[str, Any]:
        """config.json in Hugging Face's layout."""
        if self.config.sample_from_anchor:
            log.warning(
                "draft: vLLM 0.32 has no DFlash with draft.sample_from_anchor=true: one of its "
                "runners refuses it, the other does not read it, which makes a worse draft"
            )
        return export_config(self, target, target_path)

    def respelt(
        self, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `as_speculators`; the names are the same."""
        return as_speculators(config, self.own), tensors

    def decoder(self) -> DFlashDecoder:
        """A decoder for one request."""
        return DFlashDecoder(self)

    @staticmethod
    def nothing_to_learn(cfg: DFlashConfig, turns_T: Tensor, lengths_B: Tensor) -> dict[str, int]:
        """See `blocks.nothing_to_learn`."""
        return blocks.nothing_to_learn(cfg, turns_T, lengths_B)

    def denominators(self, cfg: DFlashConfig, batch: Batch) -> Tensor:
        """See `blocks.denominators`."""
        return blocks.denominators(cfg, batch)

    def objective(
        self,
        sample: Sample,
        target_head: Head,
        loss: Loss,
        cfg: DFlashConfig,
        window_K: Tensor,
    ) -> Outcome:
        """Fill the blocks of packed conversations and compare every slot with the target.

        The gradient of the last norm exists when this returns. The draft's logits are bare products
        with the target's head, as engines make them. Arguments as in `Draft.objective`.
        """
        return self.compare(self.fill(sample, target_head, cfg), loss, cfg, window_K)

    def fill(self, sample: Sample, target_head: Head, cfg: DFlashConfig) -> Filled:
        """Draw the blocks of packed conversations and fill them; arguments as in `objective`."""
        drawn = make_blocks(cfg, sample)
        state_QH = self.states(sample.ids_T, sample.aux_TA, drawn, cfg.block_size)
        state_RSH = state_QH.unflatten(0, (-1, cfg.block_size))
        states = [state_RSH[:, slot] for slot in range(self.first_slot, cfg.block_size)]
        heads = self.heads(sample, target_head)
        flops = needed_flops(self, drawn, len(sample.ids_T))
        return Filled(drawn, state_RSH, as_chains(drawn, sample.lengths), states, heads, flops)

    def compare(
        self,
        filled: Filled,
        loss: Loss,
        cfg: DFlashConfig,
        window_K: Tensor,
        addition: Addition | None = None,
        along: Callable[[RowSums], RowSums] | None = None,
    ) -> Outcome:
        """The loss of filled blocks; `addition` and `along` as in `head_and_loss`."""
        chains, states, heads = filled.chains, filled.states, filled.heads
        dynamic = cfg.position_weights == "dpace"
        text_KR = text_losses(chains, states, heads, addition) if dynamic else None
        weights = weighting(loss, cfg, window_K.to(heads.next_T.device), text_KR)
        outcome = head_and_loss(chains, states, heads, weights, along, addition)
        return replace(outcome, flops=outcome.flops + filled.flops)

    def heads(self, sample: Sample, target_head: Head) -> Heads:
        """Both heads for a sample."""
        next_T = torch.cat([sample.ids_T[1:], sample.ids_T[:1]])
        return Heads(
            self.norm, self.head_VH, self.draft_ids_D, target_head, sample.last_TH, next_T,
            self.host_ids_D,
        )  # fmt: skip

    def filled(self, sample: Sample, anchor_R: Tensor, counts_RK: Tensor) -> tuple[Tensor, float]:
        """States [K, R, H] of the slots that say a token, of blocks after some positions, and FLOP
        with the way back."""
        start_T, end_T = document_bounds(sample.lengths, anchor_R.device)
        slots = counts_RK.shape[1] + self.first_slot
        drawn = Blocks(anchor_R, start_T, end_T, counts_RK)
        state_QH = self.states(sample.ids_T, sample.aux_TA, drawn, slots)
        state_RSH = state_QH.view(len(anchor_R), slots, -1)
        flops = needed_flops(self, drawn, len(sample.ids_T))
        return state_RSH[:, self.first_slot :].transpose(0, 1), flops

    @torch.no_grad()
    def propose(
        self, sample: Sample, anchor_R: Tensor, steps: int, choose: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, float]:
        """As EAGLE-3's, each chain by one pass over its block."""
        counts_RK = torch.ones(len(anchor_R), steps, dtype=torch.bool)
        state_KRH, flops = self.filled(sample, anchor_R, counts_RK)
        normed_KRH = self.norm(state_KRH)
        weight_VH = self.head_VH.to(normed_KRH.dtype)
        chosen = [
            choose(step, (normed_RH @ weight_VH.T).float())
            for step, normed_RH in enumerate(normed_KRH)
        ]
        head = 2.0 * weight_VH.numel() * steps * len(anchor_R)
        return torch.stack(chosen), head + flops / 3

    def replayed(
        self, cfg: DFlashConfig, sample: Sample, replay: Replay
    ) -> tuple[ReplayChains, list[Tensor], float]:
        """Proposed blocks, the states of their slots, and FLOP."""
        anchor_R, counts_RK = replay.anchor_R, replay.counts_RK
        state_KRH, flops = self.filled(sample, anchor_R, counts_RK)
        chains = proposing_chains(sample.lengths, anchor_R, len(state_KRH))
        return replace(chains, supervised=list(counts_RK.T)), list(state_KRH), flops

    @torch.no_grad()
    def all_logits(self, cfg: DFlashConfig, ids_1T: Tensor, aux_1TA: Tensor) -> Tensor:
        """Logits of one block at every position of a conversation but the first, of all slots and
        in fp32."""
        state_QH = self.every_state(cfg, ids_1T, aux_1TA)
        return F.linear(self.norm(state_QH), self.head_VH.to(state_QH.dtype)).float()

    def every_state(self, cfg: DFlashConfig, ids_1T: Tensor, aux_1TA: Tensor) -> Tensor:
        """Un-normed states of the slots of one block at every position but the first; [Q, H]."""
        anchor_R = torch.arange(1, ids_1T.shape[1])
        start_T = torch.zeros(ids_1T.shape[1], dtype=torch.long)
        everywhere = Blocks(anchor_R, start_T, start_T + len(start_T), anchor_R[:, None] > 0)
        return self.states(ids_1T[0], aux_1TA[0], everywhere, cfg.block_size)


def draft_config(target: Target, cfg: DFlashConfig) -> Qwen3Config:
    """Shapes of a draft for this target: as wide as it, `num_layers` deep."""
    shape = draft_shape(target.model.config)
    size = shape["vocab_size"]
    mask = size - 1 if cfg.mask_token_id is None else cfg.mask_token_id
    if not 0 <= mask < size:
        raise InputError(f"draft.mask_token_id={mask}: the target has tokens 0..{size - 1}")
    sliding = cfg.sliding_window is not None
    kinds = [
        "sliding_attention" if sliding and layer not in cfg.full_attention_indices
        else "full_attention" for layer in range(cfg.num_layers)
    ]  # fmt: skip
    return Qwen3Config(
        **shape,
        num_hidden_layers=cfg.num_layers,
        layer_types=kinds,
        use_sliding_window=sliding,
        sliding_window=cfg.sliding_window,
        sliding_window_non_causal=cfg.sliding_window_non_causal,
        window=cfg.window,
        sample_from_anchor=cfg.sample_from_anchor,
        block_size=cfg.block_size,
        mask_token_id=mask,
        target_layers=list(target.aux_layers),
        num_target_layers=len(target.layers),
    )


def start_from_target(draft: DFlash, target: Target) -> list[str]:
    """Begin with the target's last layers and last norm, fed its highest captured state; returns
    what was not to be had: matrices that stay random, norms that stay 1, biases.

    What scales the target's logits is multiplied into the last norm: the head is the target's own.
    """
    missing = set()
    for layer, weights in zip(draft.layers, target.last_layers(len(draft.layers)), strict=True):
        for name, weight in layer.named_parameters():
            if not copy_matching(weight, weights, name):
                missing.add(name)
    ending = start_at_the_end(draft, target, weights)
    draft.norm.weight.data.mul_(target.head.scale)
    return [*sorted(missing), *ending]
