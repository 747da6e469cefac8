"""Weights and inputs of the benchmark: the same arrays for everybody, from one seed.

The draft's vocabulary holds the target's best token of every position, as real data nearly does;
otherwise SpecForge drops most rows of random inputs and any ratio means nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of the draft and its target."""

    hidden: int = 1024
    inter: int = 3072
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151936
    draft_vocab: int = 32000
    ttt: int = 7
    features: int = 3
    """Layers of the target whose states the draft sees."""
    rope_theta: float = 1e6
    rms_eps: float = 1e-6


@dataclass(frozen=True)
class Chats:
    """Conversations padded on the right to the longest."""

    ids_BT: Tensor
    aux_BTA: Tensor
    last_BTH: Tensor
    mask_BT: Tensor
    """1 where the assistant speaks."""
    lengths: list[int]
    anchor_BR: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Where DFlash's blocks start, -1 where a conversation has fewer."""


def make_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Everything but the vocabulary map, by the names that engines load."""
    g = torch.Generator().manual_seed(seed)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    H, inter = shape.hidden, shape.inter
    sizes = {
        "embed_tokens": (shape.vocab, H),
        "fc": (H, 3 * H),
        "midlayer.self_attn.q_proj": (q, 2 * H),
        "midlayer.self_attn.k_proj": (kv, 2 * H),
        "midlayer.self_attn.v_proj": (kv, 2 * H),
        "midlayer.self_attn.o_proj": (H, q),
        "midlayer.mlp.gate_proj": (inter, H),
        "midlayer.mlp.up_proj": (inter, H),
        "midlayer.mlp.down_proj": (H, inter),
        "lm_head": (shape.draft_vocab, H),
        "target_head": (shape.vocab, H),
    }
    weights = {
        f"{name}.weight": torch.randn(size, generator=g) * size[1] ** -0.5
        for name, size in sizes.items()
    }
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    for name in (*(f"midlayer.{norm}" for norm in norms), "norm"):
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(H, generator=g)
    return weights


def make_chats(shape: Shape, lengths: list[int], mask_frac: float, seed: int) -> Chats:
    """Random conversations whose first `mask_frac` is prompt; the last token is not supervised."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    mask_BT = torch.zeros(B, T, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask_BT[row, int(length * mask_frac) : length - 1] = 1
    return Chats(
        torch.randint(0, shape.vocab, (B, T), generator=g),
        torch.randn(B, T, shape.features * shape.hidden, generator=g),
        2 * torch.randn(B, T, shape.hidden, generator=g),
        mask_BT,
        lengths,
    )


def vocabulary(shape: Shape, weights: dict[str, Tensor], chats: list[Chats]) -> dict[str, Tensor]:
    """d2t and t2d with the target's best token of every position."""
    head_VH = weights["target_head.weight"]
    best = [(c.last_BTH.flatten(0, 1) @ head_VH.T).argmax(-1) for c in chats]
    t2d = torch.zeros(shape.vocab, dtype=torch.bool)
    t2d[torch.cat(best)] = True
    others = (~t2d).nonzero()[:, 0]
    chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(1))
    t2d[others[chosen[: shape.draft_vocab - int(t2d.sum())]]] = True
    return {"d2t": t2d.nonzero()[:, 0] - torch.arange(shape.draft_vocab), "t2d": t2d}


def save(path: Path, weights: dict[str, Tensor], chats: Chats) -> None:
    """One file with what a step needs, without pickles."""
    arrays = {f"w/{name}": value.numpy() for name, value in weights.items()}
    inputs = {"ids": chats.ids_BT, "aux": chats.aux_BTA, "last": chats.last_BTH}
    arrays |= {f"in/{name}": value.numpy() for name, value in inputs.items()}
    arrays |= {"in/mask": chats.mask_BT.numpy(), "in/lengths": np.asarray(chats.lengths)}
    arrays |= {"in/anchors": chats.anchor_BR.numpy()}
    np.savez(path, allow_pickle=False, **arrays)


def load(path: Path) -> tuple[dict[str, Tensor], Chats]:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        named = [name for name in arrays.files if name.startswith(("w/", "in/"))]
        tensors = {name: torch.from_numpy(arrays[name]) for name in named}
    weights = {k[2:]: v for k, v in tensors.items() if k.startswith("w/")}
    i = {k[3:]: v for k, v in tensors.items() if k.startswith("in/")}
    lengths = i["lengths"].tolist()
    return weights, Chats(i["ids"], i["aux"], i["last"], i["mask"], lengths, i["anchors"])
