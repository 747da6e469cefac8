"""A worker: one target in a process of its own, which Ray starts again when it dies."""

import os
import socket
import tempfile
import time
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy import int32
from numpy.typing import NDArray
from transformers.cache_utils import DynamicCache

from specforge_exp.artifacts import another, model_digest
from specforge_exp.config import Config, locate
from specforge_exp.errors import InputError
from specforge_exp.inference.profiling import profiled
from specforge_exp.inference.states import bytes_of, crossing, packed
from specforge_exp.inference.store import Bytes, StateStore, store_at
from specforge_exp.paths import run_dir
from specforge_exp.provenance import maker
from specforge_exp.target import Target, check_decoding, load_target, set_up_torch
from specforge_exp.target.segments import check_segments, verify_segments

if TYPE_CHECKING:
    from specforge_exp.inference.served import ServedStates

KEPT_TOKENS = 2**16
"""Of conversations whose keys and values wait for proposals: 9 GB for an 8B target."""
TRIAL_TOKENS = 512
"""Of the conversation that measures how fast a worker is."""


class TargetWorker:
    """One target. It loads with the first call, so that a refusal is an answer.

    Args:
        cfg: the training's.
        threads: CPU threads, as many as a trainer that has the target itself would use.
        cluster: folder that is removed with the cluster.
        master: what holds the states: Mooncake's address, or "": Ray.
        digest: the target's files where the training began; "": not known.
    """

    def __init__(
        self, cfg: Config, threads: int, cluster: str, master: str = "", digest: str = ""
    ) -> None:
        self.cfg, self.threads, self.cluster, self.master = cfg, threads, cluster, master
        self.digest = digest
        self.calls = 0
        self.texts: dict[bytes, DynamicCache] = {}
        """Keys and values of what was read to be judged, the oldest first."""

    @cached_property
    def store(self) -> StateStore:
        """Where states are put."""
        return store_at(self.master)

    @cached_property
    def target(self) -> Target:
        """The target, loaded; on the CPU where vLLM has the GPU. InputError when it cannot be, or
        is another one here, or by now, than where the training began."""
        if self.digest and another(self.digest, model_digest(self.cfg.model.path)):
            raise InputError(
                f"a worker on {socket.gethostname()} finds other files in model.path="
                f"{self.cfg.model.path} than the training, which began with those of its own "
                "machine; all need the same files, also while it runs"
            )
        torch.set_num_threads(self.threads)
        device, dtype = set_up_torch(self.cfg), self.cfg.model.dtype
        if self.cfg.target.engine == "vllm":
            if dtype == "auto":
                dtype = "bfloat16" if device.type == "cuda" else "float32"
            device = torch.device("cpu")
        kind = locate(self.cfg.draft._target_)
        feeds = partial(kind.target_layers, self.cfg.draft)
        target = load_target(self.cfg.model, device, dtype, 1, feeds)
        if self.cfg.target.compile:
            target.compile_layers()
        return target

    @cached_property
    def served(self) -> "ServedStates | None":
        """The server that runs the target, if one does."""
        if self.cfg.target.engine != "vllm":
            return None
        from specforge_exp.inference.served import ServedStates  # loads an HTTP client

        folder = Path(tempfile.mkdtemp(prefix="states-", dir=self.cluster))
        return ServedStates(self.cfg, self.target, folder)

    def begin(self) -> dict[str, Any]:
        """Load the target and try it: the process's id, tokens/s of one conversation, and how far
        the states of another engine than transformers are from its own.

        Raises:
            InputError: it cannot be loaded or followed, or bench could not decode it; or its
                states have no store.
        """
        apart = self.served.agreement(self.target) if self.served else 0.0
        if self.cfg.bench_engine == "transformers" and not self.served:
            check_decoding(self.target)
        if self.cfg.onpolicy.replays:
            check_segments(self.target, max(self.cfg.max_length, 4))
        assert self.store  # one that refuses says so now
        size = min(self.cfg.max_length, TRIAL_TOKENS)
        run = self.served.states if self.served else self.computed
        for _ in range(2):  # the first one warms up
            began = time.monotonic()
            run([np.zeros(size, dtype=int32)])
            seconds = time.monotonic() - began
        told = {"pid": os.getpid(), "tokens_per_s": size / seconds, "apart": apart}
        return told | {"maker": maker(self.cfg), "host": socket.gethostname()}

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
        """What the store gives for the states of each conversation, and then the seconds that it
        took.

        Raises:
            LostStates: the store takes none.
        """
        began = time.monotonic()
        if self.served:
            self.__dict__.pop("target", None)  # loaded again, should its ends be asked for again
        run = self.served.states if self.served else self.computed
        with profiled(self.cfg.target.profile, self.calls, run_dir(self.cfg) / "profile"):
            states = run(conversations)
        self.calls += 1
        return [*self.store.put(key, states), time.monotonic() - began]

    def computed(self, conversations: list[NDArray[int32]]) -> list[Bytes]:
        """The states of each conversation, run one by one."""
        return [self.read(ids, False) for ids in conversations]

    def read(self, ids: NDArray[int32], judged: bool) -> Bytes:
        """The states of one conversation; its keys and values are kept for `verify`."""
        cache = self.target.new_cache() if judged else None
        ids_1T = torch.tensor(ids, dtype=torch.long, device=self.target.device)[None]
        aux_1TA, last_1TH = self.target.features(ids_1T, cache)
        if cache is not None:
            self.texts[ids.tobytes()] = cache
            while len(self.texts) > 1 and sum(map(len, self.texts)) > KEPT_TOKENS * ids.itemsize:
                self.texts.pop(next(iter(self.texts)))
        return packed(aux_1TA[0], last_1TH[0])

    def verify(self, ids: NDArray[int32], anchors: Any, tokens: Any) -> Bytes:
        """Last states [J, R, H] of proposals [J, R] after anchors [R] of a conversation."""
        if ids.tobytes() not in self.texts:  # another process may have read it
            self.read(ids, True)
        cache = self.texts.pop(ids.tobytes())
        anchor_R, tokens_JR = (torch.from_numpy(np.array(x)) for x in (anchors, tokens))
        return bytes_of(verify_segments(self.target, cache, anchor_R, tokens_JR))
