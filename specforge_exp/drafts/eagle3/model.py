"""The EAGLE-3 draft: one decoder layer that is fed the target's hidden states and its own.

State h_0 = fc(g) with g the target's three auxiliary hidden states. One layer:
a = attention(cat(norm(embedding), norm(h))); h = h + a; h = h + mlp(norm(h)); logits =
lm_head(norm(h)); the un-normed h is the next step's state. (EAGLE-3, arXiv 2503.01840)

Shape suffixes: B batch, S slots, H hidden, A three target hidden sizes, D draft vocabulary,
V target vocabulary, N query heads, M key-value heads, E head size, P positions.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specforge_exp.config import DraftConfig
from specforge_exp.drafts.chain_attention import rotate
from specforge_exp.drafts.draft import MLP, Draft
from specforge_exp.drafts.eagle3.chains import make_chains
from specforge_exp.drafts.eagle3.decoder import Eagle3Decoder
from specforge_exp.drafts.eagle3.export import load_export, write_export
from specforge_exp.drafts.eagle3.training import denominators, objective
from specforge_exp.drafts.eagle3.unroll import unroll
from specforge_exp.drafts.layers import RMSNorm
from specforge_exp.drafts.vocabulary import check_mapping
from specforge_exp.errors import InputError
from specforge_exp.target import Target
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Outcome


class Attention(nn.Module):
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
        self.self_attn = Attention(config)
        self.mlp = MLP(H, config.intermediate_size)
        self.input_layernorm = RMSNorm(H, eps)
        self.hidden_norm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)


class Eagle3(Draft):
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

    @classmethod
    def new(
        cls, target: Target, cfg: DraftConfig, mapping: dict[str, Tensor], seed: int
    ) -> "Eagle3":
        """A fresh draft in fp32; `cfg.start` says what it knows already."""
        torch.manual_seed(seed)
        config = draft_config(target.model.config, cfg)
        draft = cls(config, target.embed_VH, mapping["d2t"].clone(), mapping["t2d"].clone())
        with torch.no_grad():
            for weight in draft.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=0.02)
            if cfg.start == "target":
                start_from_target(draft, target)
        return draft

    @property
    def draft_ids_D(self) -> Tensor:
        """Target id of every draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @classmethod
    def restored(cls, target: Target, cfg: DraftConfig, tensors: dict[str, Tensor]) -> "Eagle3":
        """The draft of a checkpoint."""
        draft = cls.new(target, cfg, {name: tensors[name] for name in ("d2t", "t2d")}, 0)
        draft.load_state_dict(tensors)
        return draft

    @staticmethod
    def target_layers(cfg: DraftConfig, layers: int) -> list[int]:
        """The layers (0-based) of a target that feed the draft unless model.aux_layers says so.

        Raises:
            InputError: the target has too few.
        """
        if layers < 7:
            raise InputError(
                f"the target has {layers} layers; the default auxiliary layers need at least 7. "
                "Name three with model.aux_layers=[a,b,c]"
            )
        return [1, layers // 2 - 1, layers - 4]

    @staticmethod
    def sglang_options(chain_length: int) -> dict[str, Any]:
        """SGLang's options for chains of this length; the folder of the draft comes to them."""
        return {
            "speculative_algorithm": "EAGLE3", "speculative_num_steps": chain_length,
            "speculative_eagle_topk": 1, "speculative_num_draft_tokens": chain_length + 1,
        }  # fmt: skip

    @classmethod
    def load(cls, folder: Path, target: Target) -> "Eagle3":
        """See `eagle3_export.load_export`."""
        return load_export(cls, folder, target)

    def write(self, folder: Path, target: Target, target_path: str, dtype: torch.dtype) -> None:
        """See `eagle3_export.write_export`."""
        write_export(self, folder, target, target_path, dtype)

    @torch.no_grad()
    def all_logits(self, cfg: DraftConfig, ids_1T: Tensor, aux_1TA: Tensor) -> Tensor:
        """Logits of every slot and step of one conversation, fp32, for comparisons."""
        everywhere_T = torch.ones_like(ids_1T[0])
        chains = make_chains("speculators", everywhere_T, [len(everywhere_T)], cfg.ttt_length)
        states = unroll(self, chains, ids_1T[0], aux_1TA[0])
        return torch.cat([self.lm_head(self.norm(state)) for state in states])

    def divisors(self, cfg: DraftConfig) -> int:
        """How many divisors an optimiser window has: one per step."""
        return cfg.ttt_length

    def denominators(self, cfg: DraftConfig, batch: Batch) -> Tensor:
        """See `eagle3_training.denominators`."""
        return denominators(cfg, batch)

    def objective(self, *arguments: Any) -> Outcome:
        """See `eagle3_training.objective`."""
        return objective(self, *arguments)

    def decoder(self) -> Eagle3Decoder:
        """A decoder for one request."""
        return Eagle3Decoder(self)

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


def draft_config(target_config: Any, draft: DraftConfig) -> LlamaConfig:
    """Shapes of a draft for this target: one Llama layer as wide as the target's.

    Raises:
        InputError: the draft's vocabulary is larger than the target's.
    """
    text = target_config.get_text_config()
    size = draft.draft_vocab_size or text.vocab_size
    if size > text.vocab_size:
        raise InputError(
            f"draft.draft_vocab_size={size} is above the target's vocabulary of {text.vocab_size}; "
            "null takes all of it"
        )
    heads = text.num_attention_heads
    return LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"],
        hidden_size=text.hidden_size,
        target_hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", heads),
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters=text.rope_parameters,
        max_position_embeddings=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        draft_vocab_size=size,
        tie_word_embeddings=False,
        attention_bias=False,
        pad_token_id=None,
    )


def start_from_target(draft: Eagle3, target: Target) -> None:
    """Begin where the target ends: its last layer, last norm and head, fed its highest state.

    The layer's embedding half stays random and is what the first steps teach. What the target's
    layer does not have in the same shape (experts, per-head norms on q and k) is left as it is.
    """
    H = draft.config.hidden_size
    theirs = target.last_layer
    theirs["hidden_norm.weight"] = theirs.pop("input_layernorm.weight")
    for name, weight in draft.midlayer.named_parameters():
        own = (
            weight[:, H:]
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
            else weight
        )
        normed_heads = name.replace("_proj", "_norm") in theirs
        if name in theirs and theirs[name].shape == own.shape and not normed_heads:
            own.copy_(theirs[name])
    draft.fc.weight.zero_()
    draft.fc.weight[:, -H:] = torch.eye(H)
    draft.norm.weight.copy_(target.final_norm_H)
    draft.lm_head.weight.copy_(target.head_weight_VH[draft.draft_ids_D.to(target.device)])
