"""The target that proposals are judged by: in this process, or in workers.

Shape suffixes: T tokens of a text, R anchors, J tokens after each, H hidden.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from specforge_exp.inference.cluster import refusal
from specforge_exp.inference.states import tensor_of, unpacked
from specforge_exp.target import Target
from specforge_exp.target.segments import verify_segments
from specforge_exp.training.batches import moved
from specforge_exp.training.features import States
from specforge_exp.training.streamed import ATTEMPTS, Stream


class Judge(Protocol):
    """Reads texts, and then says what it would say after proposals within them."""

    def read(self, texts: list[Tensor], judged: bool) -> tuple[States, list[Any]]:
        """The states of each text, and what stands for it in `verify` if it is to be `judged`."""

    def verify(self, kept: list[Any], anchors: list[Tensor], tokens: list[Tensor]) -> list[Tensor]:
        """Last states [J, R, H] of each text's proposals [J, R] after its anchors [R]; once."""


@dataclass
class Here:
    """A target of this process."""

    target: Target

    def read(self, texts: list[Tensor], judged: bool) -> tuple[States, list[Any]]:
        """See `Judge`; a text is its keys and values."""
        caches, states = [], []
        for ids_T in texts:
            cache = self.target.new_cache() if judged else None
            aux_1TA, last_1TH = self.target.features(ids_T[None].to(self.target.device), cache)
            caches.append(cache)
            states.append((aux_1TA[0], last_1TH[0]))
        return states, caches

    def verify(self, kept: list[Any], anchors: list[Tensor], tokens: list[Tensor]) -> list[Tensor]:
        """See `Judge`."""
        parts = zip(kept, anchors, tokens, strict=True)
        return [verify_segments(self.target, *part) for part in parts]


@dataclass
class Elsewhere:
    """Workers that keep the keys and values of what they have read; one that has lost them reads
    again, so that nobody's death changes a number."""

    stream: Stream
    rank: int

    def read(self, texts: list[Tensor], judged: bool) -> tuple[States, list[Any]]:
        """See `Judge`; a text is its tokens."""
        ids = [ids_T.cpu().numpy().astype(np.int32) for ids_T in texts]
        answers = self.asked("read", [(one, judged) for one in ids])
        ends, device = self.stream.ends, self.stream.device
        hidden, dtype = ends.text.hidden_size, ends.model.dtype
        states = [unpacked(data, dtype, hidden) for data in answers]
        return [(moved(aux_TA, device), moved(last_TH, device)) for aux_TA, last_TH in states], ids

    def verify(self, kept: list[Any], anchors: list[Tensor], tokens: list[Tensor]) -> list[Tensor]:
        """See `Judge`."""
        parts = zip(kept, anchors, tokens, strict=True)
        answers = self.asked("verify", [(ids, r.numpy(), jr.numpy()) for ids, r, jr in parts])
        dtype, device = self.stream.ends.model.dtype, self.stream.device
        return [moved(tensor_of(data, dtype), device) for data in answers]

    def asked(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """The workers' answers, each of a text's own worker.

        Raises:
            InputError: there is none, or the cluster is gone.
        """
        workers = self.stream.workers
        own = [workers[(self.rank + n) % len(workers)] for n in range(len(arguments))]

        def call(number: int) -> Any:
            return getattr(own[number], method).remote(*arguments[number])

        answers = [call(number) for number in range(len(own))]
        for number in range(len(own)):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    answers[number] = self.stream.wait(answers[number])
                    break
                except self.stream.ray.exceptions.RayError as error:
                    if attempt == ATTEMPTS:
                        raise refusal(error, f"the target failed {ATTEMPTS} times") from None
                    answers[number] = call(number)
        return answers
