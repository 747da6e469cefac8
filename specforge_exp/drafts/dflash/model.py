"""The DFlash draft: a few layers that fill a block of masked tokens at once.

The target's hidden states of several layers, projected and normed once, are the context of every
layer: keys and values come from context and block by the same projections, queries from the block
alone. Embeddings and head are the target's, frozen; the norm before the head is the draft's own.
(DFlash, arXiv 2602.06036)

Shape suffixes: T tokens, Q rows (slots of blocks), S slots of a block, R blocks, H hidden, A
auxiliary states, V vocabulary, N query heads, M key-value heads, E head size, X heads * E,
P positions.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from specforge_exp.config import DraftConfig
from specforge_exp.drafts.chain_attention import Visible, visible
from specforge_exp.drafts.dflash.attention import Angles, How, block_attention
from specforge_exp.drafts.dflash.blocks import Blocks, denominators
from specforge_exp.drafts.dflash.decoder import DFlashDecoder
from specforge_exp.drafts.dflash.export import load_export, write_export
from specforge_exp.drafts.dflash.flex import Hidden, flex_block_attention, hide, useful
from specforge_exp.drafts.dflash.training import objective
from specforge_exp.drafts.draft import MLP, Draft
from specforge_exp.drafts.layers import RMSNorm, linear, norm_linear, swiglu_down
from specforge_exp.errors import InputError
from specforge_exp.sharding import whole
from specforge_exp.target import Target
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Outcome


class Attention(nn.Module):
    """The projections of a layer and the norms of its heads."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        H, E = config.hidden_size, config.head_dim
        N, M = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(H, N * E, bias=False)
        self.k_proj = nn.Linear(H, M * E, bias=False)
        self.v_proj = nn.Linear(H, M * E, bias=False)
        self.o_proj = nn.Linear(N * E, H, bias=False)
        self.q_norm = RMSNorm(E, config.rms_norm_eps)
        self.k_norm = RMSNorm(E, config.rms_norm_eps)


class Layer(nn.Module):
    """One decoder layer of Qwen3's shapes."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MLP(H, config.intermediate_size)
        self.input_layernorm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)


class DFlash(Draft):
    """A DFlash draft. Parameter names are those of the files that SGLang loads.

    Args:
        config: shapes; `block_size`, `mask_token_id` and `target_layers` are on it, too.
        embed_VH: the target's embeddings.
        head_VH: the target's output embeddings; both frozen, shared and not saved.
    """

    embed_VH: Tensor
    head_VH: Tensor

    def __init__(self, config: Qwen3Config, embed_VH: Tensor, head_VH: Tensor) -> None:
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.attention = "auto"  # as draft.attention
        self.fc = nn.Linear(len(config.target_layers) * H, H, bias=False)
        self.hidden_norm = RMSNorm(H, config.rms_norm_eps)
        self.layers: Any = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(H, config.rms_norm_eps)
        self.rotary = Qwen3RotaryEmbedding(config)
        self.register_buffer("embed_VH", embed_VH, persistent=False)
        self.register_buffer("head_VH", head_VH, persistent=False)

    @classmethod
    def new(
        cls, target: Target, cfg: DraftConfig, mapping: dict[str, Tensor], seed: int
    ) -> "DFlash":
        """A fresh draft in fp32; it speaks the target's whole vocabulary, `mapping` is not used."""
        torch.manual_seed(seed)
        draft = cls(draft_config(target, cfg), target.embed_VH, target.head_weight_VH)
        draft.attention = cfg.attention
        with torch.no_grad():
            for weight in draft.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=0.02)
            if cfg.start == "target":
                start_from_target(draft, target)
        return draft

    @classmethod
    def restored(cls, target: Target, cfg: DraftConfig, tensors: dict[str, Tensor]) -> "DFlash":
        """The draft of a checkpoint."""
        draft = cls.new(target, cfg, {}, 0)
        draft.load_state_dict(tensors)
        return draft

    @staticmethod
    def target_layers(cfg: DraftConfig, layers: int) -> list[int]:
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
        """See `dflash_export.load_export`."""
        return load_export(cls, folder, target)

    def write(self, folder: Path, target: Target, target_path: str, dtype: torch.dtype) -> None:
        """See `dflash_export.write_export`."""
        write_export(self, folder, target, target_path, dtype)

    @property
    def draft_ids_D(self) -> Tensor:
        """Target id of every draft id: they are the same."""
        return torch.arange(len(self.head_VH), device=self.head_VH.device)

    def divisors(self, cfg: DraftConfig) -> int:
        """How many divisors an optimiser window has: one per label of a block."""
        return cfg.steps

    def denominators(self, cfg: DraftConfig, batch: Batch) -> Tensor:
        """See `dflash_blocks.denominators`."""
        return denominators(cfg, batch)

    def objective(self, *arguments: Any) -> Outcome:
        """See `dflash_training.objective`."""
        return objective(self, *arguments)

    def decoder(self) -> DFlashDecoder:
        """A decoder for one request."""
        return DFlashDecoder(self)

    @torch.no_grad()
    def all_logits(self, cfg: DraftConfig, ids_1T: Tensor, aux_1TA: Tensor) -> Tensor:
        """Logits of one block at every position of a conversation but the first, fp32."""
        anchor_R = torch.arange(1, ids_1T.shape[1], device=ids_1T.device)
        start_T = torch.zeros_like(ids_1T[0])
        blocks = Blocks(anchor_R, start_T, start_T + len(start_T), anchor_R[:, None] > 0)
        state_QH = self.states(ids_1T[0], aux_1TA[0], blocks, cfg.steps + 1)
        return F.linear(self.norm(state_QH), self.head_VH.to(state_QH.dtype)).float()

    def context(self, aux_TA: Tensor) -> Tensor:
        """What every layer sees of the target's states; [T, H]."""
        projected: Tensor = self.hidden_norm(linear(aux_TA, self.fc.weight))
        return projected

    def angles(self, position_P: Tensor, like: Tensor) -> Angles:
        """Rotary angles of these positions, [P, E] each, fp32."""
        cos_1PE, sin_1PE = self.rotary(like.float(), position_P[None])
        return Angles(cos_1PE[0], sin_1PE[0])

    def states(self, ids_T: Tensor, aux_TA: Tensor, blocks: Blocks, slots: int) -> Tensor:
        """Un-normed states [Q, H] of all slots of all blocks after the last layer.

        With `gradient_checkpointing` a layer keeps its input and is computed again in the backward
        pass; no number changes.
        """
        context_TH = self.context(aux_TA.to(self.compute_dtype))
        slot_S = torch.arange(slots, device=ids_T.device)
        anchor_Q = blocks.anchor_R.repeat_interleave(slots)
        first_Q = blocks.start_T[anchor_Q]
        seen: Visible | Hidden
        if useful(self.attention, ids_T.device, self.config.head_dim):
            seen = hide(anchor_Q, first_Q, slots, len(ids_T))
        else:
            seen = visible(anchor_Q - 1, first_Q)
        at_T = torch.arange(len(ids_T), device=ids_T.device) - blocks.start_T
        at_Q = at_T[anchor_Q] + slot_S.repeat(len(blocks.anchor_R))
        angles = self.angles(at_T, context_TH), self.angles(at_Q, context_TH)
        ids_U = F.pad(ids_T[blocks.anchor_R], (0, 1), value=self.config.mask_token_id)
        state_QH = F.embedding(ids_U, self.embed_VH).to(context_TH.dtype)
        for layer in self.layers:
            arguments = (self, layer, state_QH, context_TH, (seen, slots), angles)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                state_QH = checkpoint(layer_step, *arguments, use_reentrant=False)
            else:
                state_QH = layer_step(*arguments)
        return state_QH


def spread(x_UH: Tensor, slots: int) -> Tensor:
    """The rows of all blocks, from those of the anchors and, last, the mask's."""
    mask_RSH = x_UH[-1].expand(len(x_UH) - 1, slots - 1, -1)
    return torch.cat([x_UH[:-1, None], mask_RSH], 1).flatten(0, 1)


def layer_step(
    draft: DFlash,
    layer: Layer,
    state_QH: Tensor,
    context_TH: Tensor,
    seen: tuple[Visible | Hidden, int],
    angles: tuple[Angles, Angles],
) -> Tensor:
    """One layer over all blocks: the next states.

    The first layer's are one row for each anchor and one for the mask: what it makes of a masked
    slot before the rotation does not depend on the slot.
    """
    attn, mlp, E = layer.self_attn, layer.mlp, draft.config.head_dim
    keys = (attn.k_proj.weight, attn.v_proj.weight)
    weights = (attn.q_proj.weight, *keys)
    ours = [*norm_linear(state_QH, layer.input_layernorm, slice(None), *weights)]
    if len(state_QH) != len(angles[1].cos_PE):
        state_QH, *ours = (spread(x, seen[1]) for x in (state_QH, *ours))
    q_QNE, k_QME, v_QME = (x.unflatten(-1, (-1, E)) for x in ours)
    k_TME, v_TME = (linear(context_TH, weight).unflatten(-1, (-1, E)) for weight in keys)
    how = How(*seen, (attn.q_norm, attn.k_norm), angles)
    attend = flex_block_attention if isinstance(seen[0], Hidden) else block_attention
    attended_QNE = attend(how, q_QNE, (k_TME, v_TME), (k_QME, v_QME))
    state_QH = state_QH + linear(attended_QNE.flatten(1), attn.o_proj.weight)
    gate_QI, up_QI = norm_linear(
        state_QH, layer.post_attention_layernorm, slice(None),
        mlp.gate_proj.weight, mlp.up_proj.weight,
    )  # fmt: skip
    return state_QH + swiglu_down(gate_QI, up_QI, mlp.down_proj.weight)


def draft_config(target: Target, cfg: DraftConfig) -> Qwen3Config:
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


def start_from_target(draft: DFlash, target: Target) -> None:
    """Begin with the target's last layers and last norm, fed its highest captured state.

    What the target's layers do not have in the same shape (experts, other norms) is left random.
    """
    H = draft.config.hidden_size
    theirs = target.model.base_model.layers[-len(draft.layers) :]
    for layer, other in zip(draft.layers, theirs, strict=True):
        known = {name: whole(weight) for name, weight in other.named_parameters()}
        for name, weight in layer.named_parameters():
            if name in known and known[name].shape == weight.shape:
                weight.copy_(known[name])
    draft.fc.weight.zero_()
    draft.fc.weight[:, -H:] = torch.eye(H)
    draft.norm.weight.copy_(target.final_norm_H)
