"""A target whose layers are in another process: what a draft and its losses need of it here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from specforge_exp.target.head import Head
from specforge_exp.target.model import Target


@dataclass
class Ends(Target):
    """Embeddings, head and last norm of a target, measured by the process that has all of it.

    `model` has the configuration and the dtype, no weight.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    """embed [V, H], norm [H], head [V, H] unless it is the embeddings, bias [V] if there is one."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """scale, softcap and tokens of `Head`."""
    same_norm: bool = False
    """Whether the last norm is an RMS norm with this weight."""
    counted: float = 0
    fetch_layers: Callable[[int], list[dict[str, Tensor]]] = lambda number: []
    """Asks for `last_layers`."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_VH.device

    @property
    def layers(self) -> Any:
        """As many nothings as it has layers."""
        return [None] * self.text.num_hidden_layers

    @property
    def head(self) -> Head:
        """As in `Target`."""
        numbers = self.numbers | {"tokens": self.tokens}
        return Head(self.head_weight_VH, self.weights.get("bias"), **numbers)

    @property
    def embed_VH(self) -> Tensor:
        """Input embeddings."""
        return self.weights["embed"]

    @property
    def head_weight_VH(self) -> Tensor:
        """Output embeddings."""
        return self.weights.get("head", self.embed_VH)

    @property
    def parameters(self) -> float:
        """As in `Target`."""
        return self.counted

    def final_norm(self) -> tuple[Tensor, bool]:
        """As in `Target`."""
        return self.weights["norm"], self.same_norm

    def last_layers(self, number: int) -> list[dict[str, Tensor]]:
        """As in `Target`, asked for."""
        return self.fetch_layers(number)


def make_ends(
    parts: dict[str, Any],
    weights: dict[str, Tensor],
    fetch_layers: Callable[[int], list[dict[str, Tensor]]],
) -> Ends:
    """Put together what a worker told.

    Args:
        parts: head, same_norm, model, aux_layers and parameters.
        weights: see `Ends.weights`; on the device of training.
        fetch_layers: asks for weights of the last layers.
    """
    return Ends(
        SimpleNamespace(**parts["model"]), parts["aux_layers"], parts["head"]["tokens"],
        weights=weights, numbers=parts["head"], same_norm=parts["same_norm"],
        counted=parts["parameters"], fetch_layers=fetch_layers,
    )  # fmt: skip
