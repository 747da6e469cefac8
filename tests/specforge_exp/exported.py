"""What an engine computes of an exported draft: from config.json, the tensors and the target's
embeddings and head alone, in plain formulas.

Shape suffixes: S positions, B block, H hidden, E head size, N heads, V vocabulary.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


def frequencies(config: dict[str, Any]) -> tuple[Tensor, float]:
    """Radians per position of each pair of a head, and what cosine and sine are multiplied by."""
    size, base = config["head_dim"], config["rope_theta"]
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    kind = scaling["rope_type"]
    rotation = torch.tensor([base ** (-2 * i / size) for i in range(size // 2)])
    if kind == "default":
        return rotation, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return rotation / factor, 1.0
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        turns = original * rotation / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share) * rotation / factor + share * rotation, 1.0
    assert kind == "yarn", kind

    def pair(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair(scaling["beta_slow"])), size - 1)
    ramp = ((torch.arange(size // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return rotation / factor * ramp + rotation * (1 - ramp), 0.1 * math.log(factor) + 1


def rotated(config: dict[str, Any], x_SNE: Tensor, first: int) -> Tensor:
    """Heads turned by their positions, from `first` on."""
    rotation, scale = frequencies(config)
    angle_SE = torch.arange(first, first + len(x_SNE))[:, None] * rotation[None]
    cos, sin = (f(angle_SE)[:, None] * scale for f in (torch.cos, torch.sin))
    half = x_SNE.shape[-1] // 2
    a, b = x_SNE[..., :half], x_SNE[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def normed(config: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    """An RMS norm."""
    return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight


def attention(
    q_SNE: Tensor, k_TME: Tensor, v_TME: Tensor, causal: bool, window: int | None = None
) -> Tensor:
    """Softmax attention; [S, N * E]."""
    times = q_SNE.shape[1] // k_TME.shape[1]
    k_TNE, v_TNE = (x.repeat_interleave(times, 1) for x in (k_TME, v_TME))
    scores_NST = torch.einsum("sne,tne->nst", q_SNE, k_TNE) / math.sqrt(q_SNE.shape[-1])
    if causal:
        scores_NST = scores_NST + torch.full(scores_NST.shape[1:], -math.inf).triu(1)
    if window is not None:
        scores_NST = scores_NST + torch.full(scores_NST.shape[1:], -math.inf).tril(-window)
    return torch.einsum("nst,tne->sne", scores_NST.softmax(-1), v_TNE).flatten(1)


def feed_forward(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """SwiGLU."""
    gate, up, down = (tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


def eagle3_states(folder: Path, embed_SH: Tensor, aux_SA: Tensor) -> Tensor:
    """What the head is given, [S, H], of positions whose next tokens have these embeddings, fed the
    target's states."""
    config, tensors = read(folder)
    E = config["head_dim"]
    if config.get("norm_before_fc"):
        aux_SA = normed(config, aux_SA, tensors["input_norm.weight"])
    if config.get("fc_norm"):
        parts = enumerate(aux_SA.chunk(3, -1))
        norms = [normed(config, part, tensors[f"fc_norm.{n}.weight"]) for n, part in parts]
        aux_SA = torch.cat(norms, -1)
    state_SH = F.linear(aux_SA, tensors["fc.weight"])
    for number in range(config["num_hidden_layers"]):
        name = f"layers.{number}" if number else "midlayer"
        x = normed(config, state_SH, tensors[f"{name}.hidden_norm.weight"])
        if number == 0:
            state_SH = x if config.get("norm_before_residual") else state_SH
            embedded = normed(config, embed_SH, tensors[f"{name}.input_layernorm.weight"])
            x = torch.cat([embedded, x], -1)
        q, k, v = (
            F.linear(x, tensors[f"{name}.self_attn.{part}_proj.weight"]).unflatten(-1, (-1, E))
            for part in "qkv"
        )
        slides = config.get("layer_types", {number: ""})[number] == "sliding_attention"
        window = config["sliding_window"] if slides else None
        out = attention(rotated(config, q, 0), rotated(config, k, 0), v, True, window)
        state_SH = state_SH + F.linear(out, tensors[f"{name}.self_attn.o_proj.weight"])
        inner = normed(config, state_SH, tensors[f"{name}.post_attention_layernorm.weight"])
        state_SH = state_SH + feed_forward(tensors, f"{name}.mlp", inner)
    return normed(config, state_SH, tensors["norm.weight"])


def eagle3_logits(folder: Path, embed_VH: Tensor, next_S: Tensor, aux_SA: Tensor) -> Tensor:
    """Logits [D] of the first drafted token after S positions whose next tokens are known."""
    states_SH = eagle3_states(folder, embed_VH[next_S], aux_SA)
    return F.linear(states_SH[-1], read(folder)[1]["lm_head.weight"])


def dflash_logits(folder: Path, ends: tuple[Tensor, Tensor], last: int, aux_SA: Tensor) -> Tensor:
    """Logits [block - 1, V] of a block after S positions; `ends`: the target's embeddings, head."""
    config, tensors = read(folder)
    E, S, block = config["head_dim"], len(aux_SA), config["block_size"]
    context = normed(config, F.linear(aux_SA, tensors["fc.weight"]), tensors["hidden_norm.weight"])
    ids = torch.tensor([last] + [config["dflash_config"]["mask_token_id"]] * (block - 1))
    state_BH = ends[0][ids]
    for number in range(config["num_hidden_layers"]):
        name = f"layers.{number}"
        x_BH = normed(config, state_BH, tensors[f"{name}.input_layernorm.weight"])
        q, k, v = (
            F.linear(x, tensors[f"{name}.self_attn.{part}_proj.weight"]).unflatten(-1, (-1, E))
            for part, x in (
                ("q", x_BH), ("k", torch.cat([context, x_BH])), ("v", torch.cat([context, x_BH])),
            )
        )  # fmt: skip
        q, k = (
            normed(config, x, tensors[f"{name}.self_attn.{part}_norm.weight"])
            for part, x in (("q", q), ("k", k))
        )
        out = attention(rotated(config, q, S), rotated(config, k, 0), v, causal=False)
        state_BH = state_BH + F.linear(out, tensors[f"{name}.self_attn.o_proj.weight"])
        inner = normed(config, state_BH, tensors[f"{name}.post_attention_layernorm.weight"])
        state_BH = state_BH + feed_forward(tensors, f"{name}.mlp", inner)
    return F.linear(normed(config, state_BH[1:], tensors["norm.weight"]), ends[1])


def missing_code(folder: Path) -> set[str]:
    """Python files that config.json sends its reader to and that the folder does not hold."""
    config = json.loads((folder / "config.json").read_text())
    files = {f"{name.rpartition('.')[0]}.py" for name in config.get("auto_map", {}).values()}
    return {name for name in files if not (folder / name).exists()}
