"""DSpark's heads: what the token before adds to the logits, and how likely a token is to stand.

The first is a product of rank F: a feature of the token before (`markov_w1`), perhaps gated by the
slot's state or kept in a memory over the block, times `markov_w2`. (arXiv 2607.05147)

Shape suffixes: R blocks, S slots, H hidden, F rank, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_exp.drafts.layers import embedding


def project(linear: nn.Linear, *parts: Tensor) -> Tensor:
    """The projection of parts side by side, in their dtype."""
    x = torch.cat(parts, -1)
    assert linear.bias is not None
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


class MarkovHead(nn.Module):
    """What the token before adds to the logits; `kind` as draft.markov_head_type."""

    def __init__(self, vocabulary: int, rank: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, vocabulary, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def embedded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] -> [..., F]."""
        return embedding(ids, self.markov_w1.weight).to(dtype)

    def step(
        self, before_RF: Tensor, hidden_RH: Tensor, memory_RF: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The features of one slot, and the memory after it.

        Args:
            before_RF: the token before, embedded.
            hidden_RH: the slot's normed states.
            memory_RF: after the slot before; None at the first.
        """
        if self.kind == "vanilla":
            return before_RF, None
        if self.kind == "gated":
            return torch.sigmoid(project(self.gate_proj, hidden_RH, before_RF)) * before_RF, None
        memory_RF = torch.zeros_like(before_RF) if memory_RF is None else memory_RF
        joint = project(self.joint_proj, memory_RF, before_RF, hidden_RH)
        gate_RF, new_RF, out_RF = joint.chunk(3, -1)
        gate_RF = torch.sigmoid(gate_RF)
        return torch.tanh(out_RF), gate_RF * memory_RF + (1 - gate_RF) * torch.tanh(new_RF)

    def features(self, before_RSF: Tensor, hidden_RSH: Tensor) -> Tensor:
        """The features of all slots, which `markov_w2` makes logits of; [R, S, F]."""
        if self.kind != "rnn":
            return self.step(before_RSF, hidden_RSH, None)[0]
        features, memory_RF = [], None
        for before_RF, hidden_RH in zip(before_RSF.unbind(1), hidden_RSH.unbind(1), strict=True):
            feature_RF, memory_RF = self.step(before_RF, hidden_RH, memory_RF)
            features.append(feature_RF)
        return torch.stack(features, 1)


class ConfidenceHead(nn.Module):
    """How likely a slot's token is to stand when those before it do: a logit."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.with_markov = rank > 0
        self.proj = nn.Linear(hidden + rank, 1)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """[..., H] and [..., F] -> [...] fp32."""
        parts = (hidden, before) if self.with_markov else (hidden,)
        return project(self.proj, *parts)[..., 0].float()
