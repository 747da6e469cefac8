"""DFlash as the stages use it: made, trained, exported, loaded and asked to draft.

Shape suffixes: T tokens, S slots, R blocks, Q rows (slots of blocks), H hidden, A auxiliary states,
K labels of a block, V vocabulary.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config

from specforge_exp.drafts.dflash import blocks
from specforge_exp.drafts.dflash.blocks import Blocks, make_blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.decoder import DFlashDecoder
from specforge_exp.drafts.dflash.export import export_config, load_export
from specforge_exp.drafts.dflash.model import DFlashModel
from specforge_exp.drafts.dflash.training import as_chains, needed_flops, weighting
from specforge_exp.drafts.folder import write_export
from specforge_exp.drafts.head_loss import Heads, head_and_loss
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss
from specforge_exp.sharding import whole
from specforge_exp.target import Target
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Outcome, Sample


class DFlash(DFlashModel):
    """A DFlash draft."""

    @classmethod
    def new(
        cls, target: Target, cfg: DFlashConfig, mapping: dict[str, Tensor], seed: int
    ) -> "DFlash":
        """A fresh draft in fp32; it speaks the target's whole vocabulary, `mapping` is not used."""
        torch.manual_seed(seed)
        draft = cls(draft_config(target, cfg), target.embed_VH, target.head_weight_VH)
        draft.attention = cfg.attention
        draft.start_random()
        if cfg.start == "target":
            start_from_target(draft, target)
        return draft

    @classmethod
    def restored(cls, target: Target, cfg: DFlashConfig, tensors: dict[str, Tensor]) -> "DFlash":
        """The draft of a checkpoint."""
        draft = cls.new(target, cfg, {}, 0)
        draft.load_state_dict(tensors)
        return draft

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

    @classmethod
    def load(cls, folder: Path, target: Target) -> "DFlash":
        """See `export.load_export`."""
        return load_export(cls, folder, target)

    def write(self, folder: Path, target: Target, target_path: str, dtype: torch.dtype) -> None:
        """Write the folder that SGLang loads."""
        config = export_config(self, target, target_path)
        write_export(folder, config, self.state_dict(), dtype)

    def decoder(self) -> DFlashDecoder:
        """A decoder for one request."""
        return DFlashDecoder(self)

    def denominators(self, cfg: DFlashConfig, batch: Batch) -> Tensor:
        """See `blocks.denominators`."""
        return blocks.denominators(cfg, batch)

    def objective(
        self,
        sample: Sample,
        target_head_VH: Tensor,
        loss: Loss,
        cfg: DFlashConfig,
        window_K: Tensor,
    ) -> Outcome:
        """Fill the blocks of packed conversations and compare every slot with the target.

        The gradient of the last norm exists when this returns. Arguments as in `Draft.objective`.
        """
        drawn = make_blocks(cfg, sample)
        state_QH = self.states(sample.ids_T, sample.aux_TA, drawn, cfg.steps + 1)
        state_RSH = state_QH.unflatten(0, (-1, cfg.steps + 1))
        states = [state_RSH[:, place] for place in range(1, cfg.steps + 1)]
        next_T = torch.cat([sample.ids_T[1:], sample.ids_T[:1]])
        heads = Heads(
            self.norm, target_head_VH, self.draft_ids_D, target_head_VH, sample.last_TH, next_T
        )
        weights = weighting(loss, cfg, window_K.to(sample.ids_T.device))
        flops = needed_flops(self, drawn, len(sample.ids_T))
        outcome = head_and_loss(as_chains(drawn, sample.lengths), states, heads, weights)
        return replace(outcome, flops=outcome.flops + flops)

    @torch.no_grad()
    def all_logits(self, cfg: DFlashConfig, ids_1T: Tensor, aux_1TA: Tensor) -> Tensor:
        """Logits of one block at every position of a conversation but the first, fp32."""
        anchor_R = torch.arange(1, ids_1T.shape[1], device=ids_1T.device)
        start_T = torch.zeros_like(ids_1T[0])
        everywhere = Blocks(anchor_R, start_T, start_T + len(start_T), anchor_R[:, None] > 0)
        state_QH = self.states(ids_1T[0], aux_1TA[0], everywhere, cfg.steps + 1)
        return F.linear(self.norm(state_QH), self.head_VH.to(state_QH.dtype)).float()


def draft_config(target: Target, cfg: DFlashConfig) -> Qwen3Config:
    """Shapes of a draft for this target: as wide as it, `num_layers` deep."""
    text = target.model.config.get_text_config()
    heads, size = text.num_attention_heads, text.vocab_size
    mask = size - 1 if cfg.mask_token_id is None else cfg.mask_token_id
    if not 0 <= mask < size:
        raise InputError(f"draft.mask_token_id={mask}: the target has tokens 0..{size - 1}")
    return Qwen3Config(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", heads),
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters=text.rope_parameters,
        max_position_embeddings=text.max_position_embeddings,
        vocab_size=size,
        tie_word_embeddings=False,
        attention_bias=False,
        block_size=cfg.block_size,
        mask_token_id=mask,
        target_layers=list(target.aux_layers),
        num_target_layers=text.num_hidden_layers,
    )


@torch.no_grad()
def start_from_target(draft: DFlash, target: Target) -> None:
    """Begin with the target's last layers and last norm, fed its highest captured state.

    What the target's layers do not have in the same shape (experts, other norms) is left random.
    """
    H = draft.config.hidden_size
    theirs = target.model.base_model.layers[-len(draft.layers) :]
    for layer, other in zip(draft.layers, theirs, strict=True):
        weights = {name: whole(weight) for name, weight in other.named_parameters()}
        for name, weight in layer.named_parameters():
            if name in weights and weights[name].shape == weight.shape:
                weight.copy_(weights[name])
    draft.fc.weight.zero_()
    draft.fc.weight[:, -H:] = torch.eye(H)
    draft.norm.weight.copy_(target.final_norm_H)
