"""The EAGLE-3 draft: one decoder layer that is fed the target's hidden states and its own.

State h_0 = fc(g) with g the target's three auxiliary hidden states. One layer:
a = attention(cat(norm(embedding), norm(h))); h = h + a; h = h + mlp(norm(h)); logits =
lm_head(norm(h)); the un-normed h is the next step's state. (EAGLE-3, arXiv 2503.01840)

Shape suffixes: B batch, S slots, H hidden, A three target hidden sizes, D draft vocabulary,
V target vocabulary, N query heads, M key-value heads, E head size, P positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specforge_exp.drafts.chain_attention import rotate
from specforge_exp.drafts.draft import MLP, Draft
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.layers import RMSNorm
from specforge_exp.drafts.vocabulary import check_mapping


class Eagle3Attention(nn.Module):
    """The projections of the layer; q, k and v read cat(norm(embedding), norm(h))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        H, E = config.hidden_size, config.head_dim
        N, M = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(2 * H, N * E, bias=False)
        self.k_proj = nn.Linear(2 * H, M * E, bias=False)
        self.v_proj = nn.Linear(2 * H, M * E, bias=False)
        self.o_proj = nn.Linear(N * E, H, bias=False)


class Midlayer(nn.Module):
    """The one decoder layer; input_layernorm is the embedding's, hidden_norm the state's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Eagle3Attention(config)
        self.mlp = MLP(H, config.intermediate_size)
        self.input_layernorm = RMSNorm(H, eps)
        self.hidden_norm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)


class Eagle3Model(Draft[Eagle3Config]):
    """An EAGLE-3 draft. Parameter names are those of the files that SGLang and vLLM load.

    Args:
        config: shapes, rotary embedding and `draft_vocab_size`.
        embed_VH: the target's embeddings; frozen, shared and not saved.
        d2t: [D] int64, target id = draft id + d2t[draft id].
        t2d: [V] bool, which target ids the draft can propose.
    """

    d2t: Tensor
    t2d: Tensor
    embed_VH: Tensor

    def __init__(self, config: LlamaConfig, embed_VH: Tensor, d2t: Tensor, t2d: Tensor) -> None:
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.fc = nn.Linear(3 * config.target_hidden_size, H, bias=False)
        self.midlayer = Midlayer(config)
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

    def project(self, tokens_BS: Tensor, state_BSH: Tensor, positions_BS: Tensor) -> list[Tensor]:
        """Rotated queries and keys, and values: [B, S, heads, E] each."""
        attn, layer = self.midlayer.self_attn, self.midlayer
        embedded = F.embedding(tokens_BS, self.embed_VH).to(state_BSH.dtype)
        x = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(state_BSH)], -1)
        shape = (*tokens_BS.shape, -1, self.config.head_dim)
        q, k, v = (proj(x).view(shape) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        cos, sin = self.rotary(state_BSH.float(), positions_BS)
        return [rotate(q, cos, sin), rotate(k, cos, sin), v]

    def finish(self, state_BSH: Tensor, attended_BSX: Tensor) -> Tensor:
        """The layer after its attention: the un-normed next state."""
        state_BSH = state_BSH + self.midlayer.self_attn.o_proj(attended_BSX)
        normed = self.midlayer.post_attention_layernorm(state_BSH)
        out: Tensor = state_BSH + self.midlayer.mlp(normed)
        return out
