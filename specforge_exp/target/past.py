"""What a target has read of one request, and how tokens are taken out of it again.

Shape suffixes: T tokens, H hidden, A auxiliary states.
"""

import copy
from itertools import takewhile

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from specforge_exp.errors import InputError
from specforge_exp.target.anatomy import few_tokens, one_line
from specforge_exp.target.model import Target, apart, tolerance
from specforge_exp.target.packing import FAILURES


class Past:
    """What a target has read: its keys and values, and the states that feed a draft.

    Layers with a state from which no token can be taken (linear attention) go back to a copy from
    before the last tokens; what stays of those is then read once more, together with the next.

    Between two calls of an iterator that reads with it, it is whole; after an error in one, not.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.crops = target, target.crops
        self.cache = self.empty()
        self.ids: list[int] = []
        self.aux: list[Tensor] = []
        """Auxiliary states [1, T, A] of `ids`, one after the other."""
        self.held = 0
        """How many of `ids` the cache has."""
        self.before = 0, self.cache
        """The same before the last tokens, and the cache then; of a target that does not crop."""

    def empty(self) -> DynamicCache:
        """A cache of nothing."""
        return DynamicCache() if self.crops else DynamicCache(config=self.target.text)

    def begin(self, prompt: list[int]) -> Tensor:
        """Read a prompt, but for what it has in common with the tokens that were read before.

        Returns:
            Post-norm states [1, T, H] of the tokens that were new, the last one in any case.
        """
        pairs = zip(self.ids, prompt[:-1], strict=False)
        same = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
        self.forget(len(self.ids) - same)
        return self.read(prompt[same:])

    def read(self, ids: list[int]) -> Tensor:
        """Read more tokens; their post-norm states [1, T, H]."""
        again = self.ids[self.held :]
        ids_1T = torch.tensor([[*again, *ids]], device=self.target.device)
        if not self.crops:
            self.before = self.held, copy.deepcopy(self.cache)
        aux_1TA, last_1TH = self.target.features(ids_1T, self.cache)
        self.ids += ids
        self.held = len(self.ids)
        self.aux.append(aux_1TA[:, len(again) :])
        return last_1TH[:, len(again) :]

    def forget(self, tokens: int) -> None:
        """Take the last tokens out again."""
        if tokens == 0:
            return
        del self.ids[-tokens:]
        if tokens > self.aux[-1].shape[1]:
            self.aux = [torch.cat(self.aux, 1)]
        self.aux[-1] = self.aux[-1][:, :-tokens]
        if self.crops:
            self.cache.crop(-tokens)
            self.held = len(self.ids)
        elif self.held > len(self.ids):
            self.held, self.cache = self.before
            if self.held > len(self.ids):
                self.held, self.cache = 0, self.empty()


@torch.no_grad()
def check_decoding(target: Target) -> None:
    """Refuse a target that cannot be decoded token by token with tokens taken back.

    Raises:
        InputError: it cannot.
    """
    past, ids_1T = Past(target), few_tokens(target.model)
    ids = ids_1T[0].tolist()
    try:
        past.read(ids[:3])
        past.read([ids[3], ids[2], ids[1]])
        past.forget(2)
        last_1TH = past.read(ids[4:])
    except FAILURES as error:
        raise not_decodable(target, one_line(error)) from None
    difference = apart(last_1TH, target.features(ids_1T)[1][:, 4:])
    if not difference <= tolerance(last_1TH):
        raise not_decodable(target, f"with its past kept its states differ by {difference:.0%}")


def not_decodable(target: Target, reason: str) -> InputError:
    """Why bench cannot decode it, and what can."""
    return InputError(
        f"{target.text.model_type} cannot be decoded in this process ({reason}); a server "
        "decodes it: engine=sglang or engine=openai, for train and bench"
    )
