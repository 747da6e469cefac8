"""Drafting with a model of its own: a chain of its own tokens, over a cache of its own.

Shape suffixes: S positions, V vocabulary. Batch size is 1 throughout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from specforge_exp.target.anatomy import CACHE


class StandaloneDecoder:
    """Drafts chains for one request.

    The cache holds verified tokens and, between a chain and its verification, the chain's; those
    that stood stay.
    """

    def __init__(self, model: Any, draft_ids_D: Tensor) -> None:
        self.model, self.ids = model, len(draft_ids_D)
        self.cache = DynamicCache()
        self.waiting: list[int] = []  # verified ones that are not
        self.fed: list[int] = []  # drafted ones that are

    def begin(self, first: int) -> None:
        """Take the prompt's first token."""
        self.waiting = [first]

    def commit(self, aux_1SA: Tensor, next_tokens: list[int]) -> None:
        """Take the tokens after verified positions; the target's states are not needed."""
        kept = 0
        while kept < min(len(self.fed), len(next_tokens)) and self.fed[kept] == next_tokens[kept]:
            kept += 1
        if len(self.fed) > kept:
            self.cache.crop(kept - len(self.fed))
        self.fed = []
        self.waiting += next_tokens[kept:]

    @torch.no_grad()
    def read(self, tokens: list[int]) -> Tensor:
        """Logits [V] after these tokens, which the cache has from now on."""
        ids_1S = torch.tensor([tokens], device=self.model.device)
        out = self.model(ids_1S, use_cache=True, logits_to_keep=1, **{CACHE: self.cache})
        logits_V: Tensor = out.logits[0, -1, : self.ids].float()
        return logits_V

    def propose(
        self, length: int, choose: Callable[[Tensor], int]
    ) -> tuple[list[int], list[Tensor]]:
        """Draft a chain after the last verified token.

        Args:
            length: tokens to draft.
            choose: logits [V] -> token.

        Returns:
            The tokens drafted, and the logits [V] each was chosen from.
        """
        logits = [self.read(self.waiting)]
        self.waiting = []
        tokens = [choose(logits[0])]
        while len(tokens) < length:
            logits.append(self.read(tokens[-1:]))
            self.fed.append(tokens[-1])
            tokens.append(choose(logits[-1]))
        return tokens, logits
