"""The EAGLE-3 draft: a decoder layer that is fed the target's hidden states and its own.

State h_0 = fc(g) with g the target's three auxiliary hidden states. One layer:
a = attention(cat(norm(embedding), norm(h))); h = h + a; h = h + mlp(norm(h)); logits =
lm_head(norm(h)); the un-normed h is the next step's state. (EAGLE-3, arXiv 2503.01840)
`config.Variant` says what EAGLE-3.1 may change of that, further layers among it: they read
norm(h) alone.

Shape suffixes: B batch, S slots, H hidden, A three target hidden sizes, D draft vocabulary,
V target vocabulary, N query heads, M key-value heads, E head size, P positions.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_exp.drafts.chain_attention import rotate
from specforge_exp.drafts.draft import MLP, Draft, Options
from specforge_exp.drafts.eagle3.config import Variant
from specforge_exp.drafts.layers import RMSNorm, normed
from specforge_exp.drafts.vocabulary import check_mapping

if TYPE_CHECKING:  # torch's compiler comes with it, and not all who name a draft run one
    from transformers import LlamaConfig


class Eagle3Attention(nn.Module):
    """The projections of a layer; q, k and v of the first read cat(norm(embedding), norm(h))."""

    def __init__(self, config: "LlamaConfig", inputs: int) -> None:
        super().__init__()
        H, E = config.hidden_size, config.head_dim
        N, M = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(inputs, N * E, bias=False)
        self.k_proj = nn.Linear(inputs, M * E, bias=False)
        self.v_proj = nn.Linear(inputs, M * E, bias=False)
        self.o_proj = nn.Linear(N * E, H, bias=False)


class Eagle3Layer(nn.Module):
    """A decoder layer; the first one's input_layernorm is the embedding's, hidden_norm the
    state's."""

    def __init__(self, config: "LlamaConfig", first: bool) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Eagle3Attention(config, 2 * H if first else H)
        self.mlp = MLP(H, config.intermediate_size)
        self.input_layernorm = RMSNorm(H, eps)
        if first:
            self.hidden_norm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)
        self.first = first

    @property
    def state_norm(self) -> RMSNorm:
        """The norm of the state that the layer is given."""
        return self.hidden_norm if self.first else self.input_layernorm


class Eagle3Model(Draft[Options]):
    """An EAGLE-3 draft. Parameter names are those of the files that SGLang and vLLM load.

    Args:
        config: shapes, rotary embedding and `draft_vocab_size`.
        embed_VH: the target's embeddings; frozen, shared and not saved.
        d2t: [D] int64, target id = draft id + d2t[draft id].
        t2d: [V] bool, which target ids the draft can propose.
        variant: what is EAGLE-3.1's.
    """

    d2t: Tensor
    t2d: Tensor
    embed_VH: Tensor

    def __init__(
        self,
        config: "LlamaConfig",
        embed_VH: Tensor,
        d2t: Tensor,
        t2d: Tensor,
        variant: Variant | None = None,
    ) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        super().__init__()
        H, wide = config.hidden_size, config.target_hidden_size
        self.config = config
        self.variant = variant = variant or Variant()
        if variant.norm_before_fc:
            self.input_norm = RMSNorm(3 * wide, config.rms_norm_eps)
        if variant.fc_norm:
            norms = [RMSNorm(wide, config.rms_norm_eps) for _ in range(3)]
            self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(3 * wide, H, bias=False)
        self.midlayer = Eagle3Layer(config, first=True)
        further = range(1, variant.num_layers)
        self.layers = nn.ModuleDict({str(n): Eagle3Layer(config, first=False) for n in further})
        self.norm = RMSNorm(H, config.rms_norm_eps)
        self.lm_head = nn.Linear(H, config.draft_vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        check_mapping(d2t, t2d)
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)
        self.register_buffer("embed_VH", embed_VH, persistent=False)

    @property
    def draft_ids_D(self) -> Tensor:
        """Target id of every draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @property
    def stack(self) -> list[Any]:
        """All layers, the first one first."""
        return [self.midlayer, *self.layers.values()]

    def read(self, aux: Tensor) -> Tensor:
        """The target's states [..., A] as `fc` is given them."""
        if self.variant.norm_before_fc:
            aux = normed(aux, self.input_norm)
        if self.variant.fc_norm:
            pairs: Any = zip(aux.chunk(3, -1), self.fc_norm, strict=True)
            aux = torch.cat([normed(part, norm) for part, norm in pairs], -1)
        return aux

    def recycled(self, state: Tensor) -> Tensor:
        """What the next step is fed of a step's state [..., H]."""
        return normed(state, self.norm) if self.variant.norm_output else state

    def project(
        self, tokens_BS: Tensor, state_BSH: Tensor, positions_BS: Tensor, number: int = 0
    ) -> list[Tensor]:
        """Rotated queries and keys, and values of a layer: [B, S, heads, E] each."""
        layer = self.stack[number]
        attn, x = layer.self_attn, layer.state_norm(state_BSH)
        if layer.first:
            embedded = F.embedding(tokens_BS, self.embed_VH).to(state_BSH.dtype)
            x = torch.cat([layer.input_layernorm(embedded), x], -1)
        shape = (*tokens_BS.shape, -1, self.config.head_dim)
        q, k, v = (proj(x).view(shape) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        cos, sin = self.rotary(state_BSH.float(), positions_BS)
        return [rotate(q, cos, sin), rotate(k, cos, sin), v]

    def finish(self, state_BSH: Tensor, attended_BSX: Tensor, number: int = 0) -> Tensor:
        """A layer after its attention: the un-normed next state."""
        layer = self.stack[number]
        if layer.first and self.variant.norm_before_residual:
            state_BSH = layer.hidden_norm(state_BSH)
        state_BSH = state_BSH + layer.self_attn.o_proj(attended_BSX)
        out: Tensor = state_BSH + layer.mlp(layer.post_attention_layernorm(state_BSH))
        return out
