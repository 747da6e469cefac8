"""The DFlash draft: a few layers that fill a block of masked tokens at once.

The target's hidden states of several layers, projected and normed once, are the context of every
layer: keys and values come from context and block by the same projections, queries from the block
alone. Embeddings and head are the target's, frozen; the norm before the head is the draft's own.
(DFlash, arXiv 2602.06036)

Shape suffixes: T tokens, Q rows (slots of blocks), S slots of a block, R blocks, H hidden, A
auxiliary states, V vocabulary, N query heads, M key-value heads, E head size, X heads * E,
P positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config

from specforge_exp.drafts.chain_attention import Visible, visible
from specforge_exp.drafts.dflash.attention import block_attention
from specforge_exp.drafts.dflash.blocks import Blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.flex import flex_block_attention, hide, useful
from specforge_exp.drafts.dflash.heads import Angles, BlockLayout, Hidden
from specforge_exp.drafts.draft import MLP, Draft
from specforge_exp.drafts.layers import RMSNorm, linear, norm_linear, swiglu_down
from specforge_exp.training.batches import moved, moved_together


class DFlashAttention(nn.Module):
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


class DFlashLayer(nn.Module):
    """One decoder layer of Qwen3's shapes."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.head_dim = config.head_dim
        self.self_attn = DFlashAttention(config)
        self.mlp = MLP(H, config.intermediate_size)
        self.input_layernorm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)

    def forward(self, state_QH: Tensor, context_TH: Tensor, layout: BlockLayout) -> Tensor:
        """The layer over all blocks: the next states.

        The first layer's are one row for each anchor and one for the mask: what it makes of a
        masked slot before the rotation does not depend on the slot.
        """
        attn, mlp, E = self.self_attn, self.mlp, self.head_dim
        weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
        ours_QX = norm_linear(state_QH, self.input_layernorm, slice(None), *weights)
        if len(state_QH) != len(layout.angles_Q.cos_PE):
            state_QH, ours_QX = (spread(x, layout.slots) for x in (state_QH, ours_QX))
        M = len(attn.k_proj.weight) // E
        ours_QXE = ours_QX.unflatten(-1, (-1, E))
        q_QNE, k_QME, v_QME = ours_QXE.split([ours_QXE.shape[1] - 2 * M, M, M], 1)
        k_TME, v_TME = (
            linear(context_TH, *weights, which=slice(n, n + 1)).unflatten(-1, (-1, E))
            for n in (1, 2)
        )
        norms = attn.q_norm, attn.k_norm
        attend = flex_block_attention if isinstance(layout.seen, Hidden) else block_attention
        attended_QNE = attend(layout, norms, q_QNE, (k_TME, v_TME), (k_QME, v_QME))
        state_QH = state_QH + linear(attended_QNE.flatten(1), attn.o_proj.weight)
        both_QI = norm_linear(
            state_QH, self.post_attention_layernorm, slice(None),
            mlp.gate_proj.weight, mlp.up_proj.weight,
        )  # fmt: skip
        return state_QH + swiglu_down(both_QI, mlp.down_proj.weight)


class DFlashModel(Draft[DFlashConfig]):
    """A DFlash draft. Parameter names are those of the files that SGLang and vLLM load.

    Args:
        config: shapes; `block_size`, `mask_token_id`, `target_layers`, `sample_from_anchor`,
            `sliding_window_non_causal` and `window` are on it, too.
        embed_VH: the target's embeddings.
        head_VH: the target's output embeddings; both frozen, shared and not saved.
    """

    embed_VH: Tensor
    head_VH: Tensor

    def __init__(self, config: Qwen3Config, embed_VH: Tensor, head_VH: Tensor) -> None:
        # Here: torch's compiler comes with it, and not all who name a draft run one.
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        super().__init__()
        H = config.hidden_size
        self.config = config
        self.attention = "auto"  # as draft.attention
        self.fc = nn.Linear(len(config.target_layers) * H, H, bias=False)
        self.hidden_norm = RMSNorm(H, config.rms_norm_eps)
        self.layers: Any = nn.ModuleList(
            DFlashLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(H, config.rms_norm_eps)
        self.rotary = Qwen3RotaryEmbedding(config)
        self.register_buffer("embed_VH", embed_VH, persistent=False)
        self.register_buffer("head_VH", head_VH, persistent=False)

    @property
    def draft_ids_D(self) -> Tensor:
        """Target id of every draft id: they are the same."""
        return torch.arange(len(self.head_VH), device=self.head_VH.device)

    @property
    def first_slot(self) -> int:
        """The first slot of a block that says a token."""
        return int(not self.config.sample_from_anchor)

    @property
    def sliding(self) -> list[bool]:
        """Which layers have a window."""
        return [kind == "sliding_attention" for kind in self.config.layer_types]

    def window_start(self, anchor_Q: Tensor, at_Q: Tensor) -> Tensor:
        """The first position in the window of rows at places `at_Q`, which may be below 0."""
        size: int = self.config.sliding_window
        return (at_Q + 1 if self.config.window == "slot" else anchor_Q) - size

    @property
    def units(self) -> list[nn.Module]:
        """Its layers."""
        return list(self.layers)

    def context(self, aux_TA: Tensor) -> Tensor:
        """What every layer sees of the target's states; [T, H]."""
        projected: Tensor = self.hidden_norm(linear(aux_TA, self.fc.weight))
        return projected

    def angles(self, position_P: Tensor, like: Tensor) -> Angles:
        """Rotary angles of these positions, [P, E] each, fp32."""
        cos_1PE, sin_1PE = self.rotary(like.float(), position_P[None])
        return Angles(cos_1PE[0], sin_1PE[0])

    def layouts(self, blocks: Blocks, slots: int, like: Tensor) -> dict[bool, BlockLayout]:
        """Where the rows stand and what they see, in layers with a window (True) and without."""
        device = like.device
        place_T = torch.arange(len(blocks.start_T))
        at_T = place_T - blocks.start_T
        anchor_Q = blocks.anchor_R.repeat_interleave(slots)
        start_Q, slot_Q = blocks.start_T[anchor_Q], torch.arange(slots).repeat(len(blocks.anchor_R))
        at_T, at_Q = moved_together([at_T, at_T[anchor_Q] + slot_Q], device)
        angles_T, angles_Q = self.angles(at_T, like), self.angles(at_Q, like)
        made = {}
        for sliding in set(self.sliding):
            causal = sliding and not self.config.sliding_window_non_causal
            first_Q = None
            if sliding:
                first_Q = start_Q.maximum(self.window_start(anchor_Q, anchor_Q + slot_Q))
            seen: Visible | Hidden
            if useful(self.attention, device, self.config.head_dim):
                low_Q = start_Q if first_Q is None else first_Q
                anchor_there_Q, low_Q = moved_together([anchor_Q, low_Q], device)
                seen = hide(anchor_there_Q, low_Q, slots, len(at_T), causal)
            else:
                rows = visible(anchor_Q - 1, start_Q, like, first_Q)
                there_T, *numbers = moved_together([place_T, *rows.numbers], device)
                seen = rows.there(iter(numbers), there_T)
            made[sliding] = BlockLayout(seen, slots, causal, angles_T, angles_Q)
        return made

    def states(self, ids_T: Tensor, aux_TA: Tensor, blocks: Blocks, slots: int) -> Tensor:
        """Un-normed states [Q, H] of all slots of all blocks after the last layer.

        With `gradient_checkpointing` a layer keeps its input and is computed again in the backward
        pass; no number changes.
        """
        context_TH = self.context(aux_TA.to(self.compute_dtype))
        device = ids_T.device
        layouts = self.layouts(blocks, slots, context_TH)
        anchor_R = moved(blocks.anchor_R, device)
        ids_U = F.pad(ids_T[anchor_R], (0, 1), value=self.config.mask_token_id)
        state_QH = F.embedding(ids_U, self.embed_VH).to(context_TH.dtype)
        for layer, sliding in zip(self.layers, self.sliding, strict=True):
            layout = layouts[sliding]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                state_QH = checkpoint(layer, state_QH, context_TH, layout, use_reentrant=False)
            else:
                state_QH = layer(state_QH, context_TH, layout)
        return state_QH


def spread(x_UH: Tensor, slots: int) -> Tensor:
    """The rows of all blocks, from those of the anchors and, last, the mask's."""
    mask_RSH = x_UH[-1].expand(len(x_UH) - 1, slots - 1, -1)
    return torch.cat([x_UH[:-1, None], mask_RSH], 1).flatten(0, 1)
