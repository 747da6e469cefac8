"""Weights and inputs of the DFlash benchmark: the same arrays and the same blocks for everybody.

The text is what the target itself would say greedily: every token is its most likely one after the
position before. So a label read from the text (SpecForge, ours) is the target's best token
(speculators). The target's last states have the root mean square SCALE at every position, so that
speculators' verifier norm with that weight reads the states that everybody else reads.

Anchors are drawn once and given to everybody: two supervised tokens in a row, as SpecForge asks,
not the first token, and the whole block inside its conversation, as speculators needs for the last.

    python -m peers.dflash_inputs FILE --shape '{"hidden": 32, ...}' --lengths 21 37

writes such inputs, for `peers.<peer>_dflash_step FILE --shape ... --record OUT`.

Shape suffixes: B conversations, T tokens, H hidden, R blocks of a conversation (-1: none).
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peers import inputs
from peers.inputs import Chats

SCALE = 2.0


@dataclass(frozen=True)
class Shape(inputs.Shape):
    """Sizes of a DFlash draft and its target."""

    features: int = 5
    layers: int = 5
    block_size: int = 16
    loss_gamma: float = 7.0
    mask: int | None = None
    """The token of masked slots; None: the last."""
    sample_from_anchor: bool = False
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    """With a window: layers without one."""
    non_causal: bool = False
    weights: str = "decay"
    """Of places: decay or dpace."""
    markov_rank: int = 0
    """Above 0: a DSpark draft with heads of this rank."""
    markov_head: str = "vanilla"
    confidence: float = 1.0
    """Weight of the confidence head's loss."""

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From JSON; what it leaves out has its default."""
        return cls(**json.loads(text))

    @property
    def mask_token(self) -> int:
        """The token that stands for masked slots."""
        return self.vocab - 1 if self.mask is None else self.mask

    @property
    def places(self) -> range:
        """Of labels after their anchor."""
        return range(1, self.block_size + self.sample_from_anchor)

    @property
    def qwen3(self) -> dict[str, Any]:
        """What a Qwen3Config of the draft's layers takes."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.inter,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "num_hidden_layers": self.layers,
            "layer_types": [
                "full_attention"
                if self.sliding_window is None or layer in self.full_layers
                else "sliding_attention"
                for layer in range(self.layers)
            ],
            "use_sliding_window": self.sliding_window is not None,
            "sliding_window": self.sliding_window,
            "rms_norm_eps": self.rms_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


def make_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """The draft's weights by the names that engines load, the target's embeddings and head."""
    g = torch.Generator().manual_seed(seed)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    H, inter, E = shape.hidden, shape.inter, shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (shape.vocab, H), "lm_head": (shape.vocab, H),
        "fc": (H, shape.features * H), "hidden_norm": (H,), "norm": (H,),
    }  # fmt: skip
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, H), "self_attn.k_proj": (kv, H), "self_attn.v_proj": (kv, H),
        "self_attn.o_proj": (H, q), "self_attn.q_norm": (E,), "self_attn.k_norm": (E,),
        "mlp.gate_proj": (inter, H), "mlp.up_proj": (inter, H), "mlp.down_proj": (H, inter),
        "input_layernorm": (H,), "post_attention_layernorm": (H,),
    }  # fmt: skip
    if rank := shape.markov_rank:
        sizes |= {"markov_head.markov_w1": (shape.vocab, rank)}
        sizes |= {"markov_head.markov_w2": (shape.vocab, rank)}
        sizes |= {
            "vanilla": {},
            "gated": {"markov_head.gate_proj": (rank, H + rank)},
            "rnn": {"markov_head.joint_proj": (3 * rank, H + 2 * rank)},
        }[shape.markov_head]
        sizes |= {"confidence_head.proj": (1, H + rank)}
    for number in range(shape.layers):
        sizes |= {f"layers.{number}.{name}": size for name, size in layer.items()}
    weights = {}
    for name, size in sizes.items():
        noise = torch.randn(size, generator=g)
        weights[f"{name}.weight"] = 1 + 0.1 * noise if len(size) == 1 else noise * size[1] ** -0.5
    for name in ("markov_head.gate_proj", "markov_head.joint_proj", "confidence_head.proj"):
        if name in sizes:
            weights[f"{name}.bias"] = 0.1 * torch.randn(sizes[name][0], generator=g)
    return weights


def make_chats(
    shape: Shape, head_VH: Tensor, lengths: list[int], mask_frac: float, every: int
) -> Chats:
    """Random states, the target's own text, and one anchor for `every` tokens.

    Args:
        shape: sizes.
        head_VH: the target's output embeddings.
        lengths: tokens of each conversation.
        mask_frac: the share of each that is its prompt.
        every: tokens for each anchor, the prompt's included.
    """
    chats = inputs.make_chats(shape, lengths, mask_frac, seed=1)
    last_BTH = SCALE * torch.nn.functional.rms_norm(chats.last_BTH, [shape.hidden])
    ids_BT = chats.ids_BT.clone()
    ids_BT[:, 1:] = torch.stack([(state_TH @ head_VH.T).argmax(-1)[:-1] for state_TH in last_BTH])
    g = torch.Generator().manual_seed(2)
    anchor_BR = torch.full((len(lengths), max(lengths) // every), -1)
    for row, length in enumerate(lengths):
        both_T = (chats.mask_BT[row, 1:-1] > 0) & (chats.mask_BT[row, 2:] > 0)
        possible = both_T[: length - shape.places.stop].nonzero()[:, 0] + 1
        drawn = possible[torch.randperm(len(possible), generator=g)[: length // every]]
        anchor_BR[row, : len(drawn)] = drawn.sort().values
    return replace(chats, ids_BT=ids_BT, last_BTH=last_BTH, anchor_BR=anchor_BR)


def packed_anchors(chats: Chats) -> Tensor:
    """The anchors' positions in the conversations put one after the other; [R]."""
    first = [sum(chats.lengths[:row]) for row in range(len(chats.lengths))]
    return torch.cat(
        [anchor_R[anchor_R >= 0] + at for anchor_R, at in zip(chats.anchor_BR, first, strict=True)]
    )


def label_weights(shape: Shape, chats: Chats) -> tuple[int, float]:
    """How many labels count, and the sum of their decays: the divisors of the peers' means."""
    row_R, column_R = (chats.anchor_BR >= 0).nonzero(as_tuple=True)
    place_K = torch.tensor(shape.places)
    at_RK = chats.anchor_BR[row_R, column_R][:, None] + place_K
    counts_RK = chats.mask_BT[row_R[:, None], at_RK] > 0
    decay_K = torch.exp(-(place_K - 1) / shape.loss_gamma)
    return int(counts_RK.sum()), float((counts_RK * decay_K).sum())


def main() -> None:
    """Write the inputs that the command line asks for: half prompts, an anchor for 3 tokens."""
    parser = argparse.ArgumentParser(description="Inputs of a DFlash or DSpark step")
    parser.add_argument("file", type=Path)
    parser.add_argument("--shape", type=Shape.parse, default=Shape())
    parser.add_argument("--lengths", type=int, nargs="+", default=[21, 37])
    args = parser.parse_args()
    weights = make_weights(args.shape, seed=0)
    chats = make_chats(args.shape, weights["lm_head.weight"], args.lengths, 0.5, 3)
    inputs.save(args.file, weights, chats)


if __name__ == "__main__":
    main()
