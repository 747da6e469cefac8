"""Small random models of the families that people serve, from transformers' own configurations.

8 layers of width 64; norms a little off 1 (or 0, where the family adds 1), biases not 0.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version
from torch import Tensor

VOCABULARY = 320
CONTEXT = 256
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
HEADS = {**BASE, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LATENT = {
    **BASE, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
SPARSE = {**LATENT, "index_topk": 12, "index_head_dim": 16, "index_n_heads": 16}
GATED = {name: value for name, value in LINEAR.items() if name.startswith("linear")}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DEEPSEEK_YARN = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}


def longrope(dimensions: int) -> dict[str, Any]:
    """Long context of Phi: factors per frequency, others from 128 tokens on."""
    half = dimensions // 2
    return {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
        "short_factor": [1.1] * half, "long_factor": [4.0] * half,
    }  # fmt: skip


def siglip() -> Any:
    """The smallest eyes."""
    return tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip


def pixtral() -> Any:
    """The smallest eyes of Mistral."""
    return tf.PixtralVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip


def falcon() -> Any:
    """Names of its own."""
    names = ("intermediate_size", "num_key_value_heads")
    rest = {name: value for name, value in BASE.items() if name not in names}
    return tf.FalconConfig(**rest, new_decoder_architecture=True, num_kv_heads=2)


FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama 2": lambda: tf.LlamaConfig(**BASE),
    "Llama 3.x": lambda: tf.LlamaConfig(**BASE, rope_parameters=LLAMA3),
    "Llama with dynamic NTK": lambda: tf.LlamaConfig(
        **BASE, rope_parameters={"rope_type": "dynamic", "rope_theta": 5e4, "factor": 2.0}
    ),
    "Llama 4 (text)": lambda: tf.Llama4TextConfig(
        **HEADS, num_local_experts=4, intermediate_size_mlp=96, attention_chunk_size=32
    ),
    "Qwen2.5": lambda: tf.Qwen2Config(**BASE),
    "Qwen3": lambda: tf.Qwen3Config(**HEADS),
    "Qwen3 with YaRN": lambda: tf.Qwen3Config(**HEADS, rope_parameters=YARN),
    "Qwen3-MoE": lambda: tf.Qwen3MoeConfig(**HEADS, **EXPERTS),
    "Qwen3-Next": lambda: tf.Qwen3NextConfig(**HEADS, **EXPERTS, **LINEAR),
    "Mistral v0.3": lambda: tf.MistralConfig(**BASE, sliding_window=32),
    "Mistral Nemo": lambda: tf.MistralConfig(**BASE, head_dim=32, sliding_window=None),
    "Mistral Small 3.x": lambda: tf.Mistral3Config(
        text_config=tf.MistralConfig(**HEADS, sliding_window=None), vision_config=pixtral()
    ),
    "Mixtral": lambda: tf.MixtralConfig(**BASE, num_local_experts=4, sliding_window=None),
    "Gemma 2": lambda: tf.Gemma2Config(**HEADS, sliding_window=32, final_logit_softcapping=3.0),
    "Gemma 3 (text)": lambda: tf.Gemma3TextConfig(
        **HEADS,
        sliding_window=32,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    ),
    "Gemma 3 (pictures)": lambda: tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**HEADS, sliding_window=32), vision_config=siglip()
    ),
    "Phi-3, Phi-4": lambda: tf.Phi3Config(**BASE),
    "Phi-4-mini": lambda: tf.Phi3Config(
        **BASE,
        original_max_position_embeddings=128,
        rope_parameters={**longrope(12), "partial_rotary_factor": 0.75},
    ),
    "gpt-oss": lambda: tf.GptOssConfig(
        **HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=32,
        rope_parameters={**YARN, "truncate": False},
    ),
    "DeepSeek-V3": lambda: tf.DeepseekV3Config(**LATENT, rope_parameters=DEEPSEEK_YARN),
    "Kimi K2 (MLA)": lambda: tf.DeepseekV3Config(**{**LATENT, "n_shared_experts": 1}),
    "GLM-4": lambda: tf.Glm4Config(**HEADS),
    "GLM-4.5": lambda: tf.Glm4MoeConfig(
        **HEADS,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "Granite 3": lambda: tf.GraniteConfig(
        **BASE,
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.1,
    ),
    "Cohere 2": lambda: tf.Cohere2Config(**BASE, logit_scale=0.25, sliding_window=32),
    "OLMo 2": lambda: tf.Olmo2Config(**BASE),
    "OLMo 3": lambda: tf.Olmo3Config(**BASE, sliding_window=32),
    "Nemotron": lambda: tf.NemotronConfig(**BASE),
    "SmolLM3": lambda: tf.SmolLM3Config(**BASE),
    "StableLM": lambda: tf.StableLmConfig(**BASE),
    "GPT-NeoX": lambda: tf.GPTNeoXConfig(**BASE),
    "Falcon": falcon,
    "Qwen3.5": lambda: tf.Qwen3_5TextConfig(**HEADS, **GATED),
    "Qwen3-VL": lambda: tf.Qwen3VLConfig(
        text_config=tf.Qwen3VLTextConfig(
            **{k: v for k, v in HEADS.items() if k not in ("bos_token_id", "eos_token_id")},
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        ),
        vision_config=tf.Qwen3VLVisionConfig(
            depth=1,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=64,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
    ),
    "Gemma 4": lambda: tf.Gemma4TextConfig(
        **HEADS,
        sliding_window=32,
        global_head_dim=32,
        num_kv_shared_layers=2,
        layer_types=2 * [*3 * ["sliding_attention"], "full_attention"],
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY,
        final_logit_softcapping=3.0,
    ),
    "Mistral Small 4": lambda: tf.Mistral4Config(
        **{**LATENT, "first_k_dense_replace": 0},
        rope_parameters={**DEEPSEEK_YARN, "llama_4_scaling_beta": 0.1},
    ),
    "DeepSeek-V3.2": lambda: tf.DeepseekV32Config(**SPARSE),
    "DeepSeek-V4": lambda: tf.DeepseekV4Config(
        **HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        sliding_window=32,
        num_nextn_predict_layers=0,
    ),
    "GLM-5": lambda: tf.GlmMoeDsaConfig(**SPARSE),
    "Kimi Linear": lambda: tf.KimiLinearConfig(
        **{k: v for k, v in LATENT.items() if k not in ("q_lora_rank", "n_routed_experts")},
        num_local_experts=4,
        linear_head_dim=16,
        linear_num_heads=4,
    ),
    "Falcon-H1": lambda: tf.FalconH1Config(
        **BASE,
        **MAMBA,
        mamba_d_ssm=128,
        lm_head_multiplier=0.5,
        key_multiplier=0.7,
    ),
    "Granite 4": lambda: tf.GraniteMoeHybridConfig(
        **BASE,
        **MAMBA,
        layer_types=2 * [*3 * ["linear_attention"], "full_attention"],
        num_local_experts=4,
        shared_intermediate_size=32,
        logits_scaling=8.0,
    ),
    "Nemotron-H": lambda: tf.NemotronHConfig(
        **{k: v for k, v in HEADS.items() if k != "num_hidden_layers"},
        layers_block_type=2 * ["linear_attention", "moe", "full_attention", "mlp"],
        ssm_state_size=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    ),
    "LFM2": lambda: tf.Lfm2Config(**BASE, layer_types=4 * ["conv", "full_attention"]),
    "Jamba": lambda: tf.JambaConfig(**BASE, num_experts=4, mamba_d_state=8),
    "MiniMax": lambda: tf.MiniMaxConfig(**HEADS, num_local_experts=4, num_experts_per_tok=2),
}
LINEAR_STATES = {
    "Qwen3-Next", "Qwen3.5", "Kimi Linear", "Falcon-H1", "Granite 4", "Nemotron-H", "LFM2", "Jamba",
    "MiniMax",
}  # fmt: skip
"""Those with a state that no token can be taken out of."""
ENTANGLED = {*LINEAR_STATES}
"""Those whose packed conversations see each other."""
NOT_FED = {"DeepSeek-V4"}
"""Those whose layers give several states for a token."""
if Version(tf.__version__) < Version("5.24"):  # Falcon's mask did not know its positions
    ENTANGLED.add("Falcon")
FAST = {
    "Llama 3.x", "Gemma 3 (pictures)", "gpt-oss", "Granite 3", "Phi-4-mini", "Gemma 4", "Qwen3.5",
}  # fmt: skip
"""One of each kind of attention, scale and cache."""
each_family = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES],
)


def build(config: Any) -> Any:
    """Random weights of a configuration."""
    torch.manual_seed(0)
    try:
        model = tf.AutoModelForCausalLM.from_config(config)
    except ValueError:
        model = tf.AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and weight.dim() == 1 and name.endswith("weight"):
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            elif name.endswith("bias"):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def save(config: Any, folder: Path) -> Path:
    """A model folder without a tokenizer."""
    build(config).save_pretrained(folder)
    return folder


def tokens(length: int, seed: int = 0) -> Tensor:
    """[length] ids that are no special token."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
