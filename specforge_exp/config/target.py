"""Where training runs the target, and what is kept of its states."""

from dataclasses import dataclass, field
from typing import Any

from specforge_exp.config.checks import above_zero, allow, changed, minimums
from specforge_exp.errors import InputError

OURS = {
    "model", "served_model_name", "dtype", "max_model_len", "enable_prefix_caching",
    "no_enable_prefix_caching", "speculative_config", "kv_transfer_config", "host", "port",
    "tensor_parallel_size",
}  # fmt: skip
"""Options of a vLLM server that its states depend on."""
APART = {
    "pack_tokens cache": (
        "states kept would be those of other company after an interruption; disk packs the same "
        "conversations always"
    ),
    "pack_tokens shard": "processes that share a target read one conversation at a time",
    "pack_tokens placement": "workers read one conversation at a time",
    "compile pack_tokens": "each number of conversations would be compiled by itself",
    "compile shard": "processes that share a target exchange data within its layers",
    "compile engine": "vLLM compiles the target itself; target.args are its options",
    "placement shard": "with ray the trainers hold none of the target",
}
"""Of two options why one does not go with the other, as far as they are given (`check_apart`)."""


@dataclass
class TargetConfig:
    """How training gets the target's hidden states."""

    cache: str = "none"
    """none: run the target in every step; memory: keep its states, 4 hidden sizes of numbers per
    token (DFlash 6); disk: write them beside the tokens, once for all epochs and runs. Changes no
    number."""

    shard: bool = False
    """Share each of its layers among the processes of trainer.gpus, by transformers' tensor
    parallelism: for a target that does not fit one GPU. All of them then run every conversation."""

    pack_tokens: int | None = None
    """inprocess: tokens of conversations that it reads in one forward, apart from each other:
    fewer, larger operations. The last digits of a conversation's states then depend on what it is
    read with, so on trainer.gpus too. null: one by one."""

    compile: bool = False
    """transformers: torch.compile its layers, once, when it is loaded: fewer, larger kernels. The
    last digits of its states change."""

    placement: str = "inprocess"
    """inprocess: each trainer has the target; ray: it runs in workers of their own, on other GPUs,
    and the trainers hold none of it (docs/ray.md). Changes no number."""
    workers: int = 1
    """ray: processes that run the target, on the last GPUs of the machine; trainer.gpus are the
    first. With RAY_ADDRESS in the environment they live in that cluster."""
    engine: str = "transformers"
    """ray: what runs the target: transformers, whose states are those of inprocess to the bit, or
    vllm, a server of each worker's own, whose states are others in the last digits."""
    tp_size: int = 1
    """ray: GPUs of one worker; more than one with engine=vllm."""
    python: str | None = None
    """engine=vllm: the Python that has vLLM, whose versions differ from those of training; null:
    this one."""
    args: dict[str, Any] = field(default_factory=dict)
    """engine=vllm: more of the server's options, e.g. gpu_memory_utilization: 0.8."""
    store: str = "ray"
    """ray: what holds states between worker and trainer: ray, its shared memory; or
    mooncake, a process of its own, which RDMA reaches from other machines (extra mooncake).
    Changes no number."""
    buffer_gb: float = 8.0
    """ray: 1e9 bytes of states that may be asked for and not used yet, all trainers together."""
    share: str = "none"
    """ray: none: a training has workers of its own; sweep: the runs of a grid that go on at the
    same time here have them together, and the target runs once for those that want the same states
    in the same order. Changes no number."""
    share_patience: float = 300.0
    """sweep: seconds that runs whose buffer is full wait for one that is to come or does nothing;
    then it has its states alone."""
    profile: list[int] = field(default_factory=list)
    """ray, transformers: [start, calls]: torch.profiler over so many calls after the start-th of
    each worker, a trace of each in the run's folder, profile/; []: none."""
    alone: str = "none"
    """ray, for looking at one side, over max_steps steps, or 20: workers: states are asked for and
    taken as fast as they come, nothing is trained; trainer: without workers, on random numbers in
    the shape of states. Both print speeds and write nothing; none: a training."""
    dry_run: bool = False
    """ray: print which GPUs train and which run the target, and the buffer; start nothing."""

    def __post_init__(self) -> None:
        allow(self, "target.", cache="none memory disk", placement="inprocess ray")
        allow(self, "target.", engine="transformers vllm", store="ray mooncake", share="none sweep")
        allow(self, "target.", alone="none workers trainer")
        minimums(self, "target.", workers=1, tp_size=1, pack_tokens=1)
        above_zero(self, "target.", "buffer_gb share_patience")
        self.check_apart()
        if self.shard and self.cache == "memory":
            raise InputError(
                "target.shard=true needs target.cache=none or disk: with memory each process would "
                "keep, and ask for, other conversations"
            )
        if self.engine == "transformers" and (of_vllm := changed(self, "tp_size python args")):
            raise InputError(
                f"target.{of_vllm[0]} needs target.placement=ray and target.engine=vllm; with "
                "transformers a target that does not fit one GPU is shared by the trainers: "
                "target.shard=true"
            )
        window = self.profile
        if window and (len(window) != 2 or window[0] < 0 or window[1] < 1):
            raise InputError(f"target.profile={window} is not [start, calls], e.g. [10,3]")
        if window and self.engine == "vllm":
            raise InputError(
                "target.profile is for target.engine=transformers; vLLM has a profiler of its own: "
                "+target.args.profiler_config=..."
            )
        if self.engine == "vllm" and self.placement != "ray":
            raise InputError("target.engine=vllm needs target.placement=ray: it runs in a worker")
        if ours := [key for key in self.args if key.replace("-", "_") in OURS]:
            raise InputError(f"target.args.{ours[0]} is set by what the states need")
        if self.placement == "ray" and self.cache == "disk":
            raise InputError(
                "target.placement=ray needs target.cache=none or memory: states on disk are made "
                "by the trainers themselves, once, with target.placement=inprocess"
            )
        if self.share == "sweep" and self.store != "ray":
            raise InputError(
                f"target.share=sweep needs target.store=ray, not {self.store}: what several runs "
                "take lies in Ray's store"
            )
        of_ray = changed(self, "workers dry_run store share alone profile")
        if self.placement == "inprocess" and of_ray:
            raise InputError(f"target.{of_ray[0]} needs target.placement=ray")

    def check_apart(self) -> None:
        """Refuse options that do not go with each other."""
        given = {
            "pack_tokens": self.pack_tokens is not None,
            "compile": self.compile,
            "shard": self.shard,
            "cache": self.cache == "memory",
            "placement": self.placement == "ray",
            "engine": self.engine == "vllm",
        }
        for pair, reason in APART.items():
            one, other = pair.split()
            if given[one] and given[other]:
                own, others = (str(vars(self)[name]).lower() for name in (one, other))
                raise InputError(
                    f"target.{one}={own} and target.{other}={others} exclude each other: {reason}"
                )

    @property
    def gpus(self) -> int:
        """That the workers have, together."""
        return self.workers * self.tp_size

    @property
    def own_gpus(self) -> int:
        """That a training's own workers have; of shared ones nobody can say whose they are."""
        return self.gpus if (self.placement, self.share) == ("ray", "none") else 0
