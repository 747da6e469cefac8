"""A worker: one target in a process of its own, which Ray starts again when it dies."""

import os
import time
from functools import cached_property, partial
from typing import Any

import torch
from numpy import int32
from numpy.typing import NDArray

from specforge_exp.config import Config, locate
from specforge_exp.inference.states import crossing, packed
from specforge_exp.inference.store import Bytes, StateStore, store_at
from specforge_exp.target import Target, load_target, set_up_torch

TRIAL_TOKENS = 512
"""Of the conversation that measures how fast a worker is."""


class TargetWorker:
    """One target. It loads with the first call, so that a refusal is an answer.

    Args:
        cfg: the training's.
        threads: CPU threads, as many as a trainer that has the target itself would use.
        master: what holds the states: Mooncake's address, or "": Ray.
    """

    def __init__(self, cfg: Config, threads: int, master: str = "") -> None:
        self.cfg, self.threads, self.master = cfg, threads, master

    @cached_property
    def store(self) -> StateStore:
        """Where states are put."""
        return store_at(self.master)

    @cached_property
    def target(self) -> Target:
        """The target, loaded; InputError when it cannot be."""
        torch.set_num_threads(self.threads)
        device = set_up_torch(self.cfg)
        kind = locate(self.cfg.draft._target_)
        feeds = partial(kind.target_layers, self.cfg.draft)
        return load_target(self.cfg.model, device, self.cfg.model.dtype, 1, feeds)

    def begin(self) -> dict[str, Any]:
        """Load the target and try it: the process's id, tokens/s of one conversation.

        Raises:
            InputError: it cannot be loaded or followed, or bench could not decode it; or its
                states have no store.
        """
        if self.cfg.bench_engine == "transformers":
            self.target.check_decoding()
        assert self.store  # one that refuses says so now
        size = min(self.cfg.max_length, TRIAL_TOKENS)
        ids_1T = torch.zeros(1, size, dtype=torch.long, device=self.target.device)
        for _ in range(2):  # the first one warms up
            began = time.monotonic()
            packed(*(x_1T[0] for x_1T in self.target.features(ids_1T)))
        return {"pid": os.getpid(), "tokens_per_s": size / (time.monotonic() - began)}

    def ends(self) -> dict[str, Any]:
        """What `Ends` is made of, its tensors as bytes."""
        target = self.target
        head = target.head
        norm_H, same = target.final_norm()
        weights = {"embed": target.embed_VH, "norm": norm_H}
        if not target.tied:
            weights["head"] = head.weight_VH
        if head.bias_V is not None:
            weights["bias"] = head.bias_V
        numbers = {"scale": head.scale, "softcap": head.softcap, "tokens": head.tokens}
        return {
            "weights": crossing(weights),
            "head": numbers,
            "same_norm": same,
            "model": {"config": target.model.config, "dtype": target.model.dtype},
            "aux_layers": target.aux_layers,
            "parameters": target.parameters,
        }

    def last_layers(self, number: int) -> list[dict[str, Any]]:
        """`Target.last_layers`, as bytes."""
        return [crossing(weights) for weights in self.target.last_layers(number)]

    def states(self, conversations: list[NDArray[int32]], key: str) -> list[Any]:
        """What the store gives for the states of each conversation, run one by one, and then the
        seconds that it took.

        Raises:
            LostStates: the store takes none.
        """
        began, device = time.monotonic(), self.target.device
        states: list[Bytes] = []
        for ids in conversations:
            ids_1T = torch.tensor(ids, dtype=torch.long, device=device)[None]
            aux_1TA, last_1TH = self.target.features(ids_1T)
            states.append(packed(aux_1TA[0], last_1TH[0]))
        return [*self.store.put(key, states), time.monotonic() - began]
