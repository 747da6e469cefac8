"""Where training runs the target, and what is kept of its states."""

from dataclasses import dataclass, field
from typing import Any

from specforge_exp.config.checks import above_zero, allow, minimums
from specforge_exp.errors import InputError

OURS = {
    "model", "served_model_name", "dtype", "max_model_len", "enable_prefix_caching",
    "no_enable_prefix_caching", "speculative_config", "kv_transfer_config", "host", "port",
    "tensor_parallel_size",
}  # fmt: skip
"""Options of a vLLM server that its states depend on."""


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
        minimums(self, "target.", workers=1, tp_size=1)
        above_zero("target.buffer_gb", self.buffer_gb)
        above_zero("target.share_patience", self.share_patience)
        minimums(self, "target.", pack_tokens=1)
        self.check_packing()
        self.check_compiling()
        if self.shard and self.cache == "memory":
            raise InputError(
                "target.shard=true needs target.cache=none or disk: with memory each process would "
                "keep, and ask for, other conversations"
            )
        if self.engine == "transformers" and (self.tp_size > 1 or self.python or self.args):
            key = "tp_size" if self.tp_size > 1 else "python" if self.python else "args"
            raise InputError(
                f"target.{key} needs target.placement=ray and target.engine=vllm; with transformers"
                " a target that does not fit one GPU is shared by the trainers: target.shard=true"
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
        if self.placement == "ray" and self.shard:
            raise InputError(
                "target.placement=ray and target.shard=true exclude each other: with ray the "
                "trainers hold none of the target"
            )
        given = {
            "workers": self.workers > 1,
            "dry_run": self.dry_run,
            "store": self.store != "ray",
            "share": self.share != "none",
            "alone": self.alone != "none",
            "profile": bool(self.profile),
        }
        if self.share == "sweep" and self.store != "ray":
            raise InputError(
                f"target.share=sweep needs target.store=ray, not {self.store}: what several runs "
                "take lies in Ray's store"
            )
        if self.placement == "inprocess" and any(given.values()):
            key = next(key for key, value in given.items() if value)
            raise InputError(f"target.{key} needs target.placement=ray")

    def check_packing(self) -> None:
        """Refuse what conversations read together do not go with."""
        if self.pack_tokens is None:
            return
        needed = {"cache": self.cache != "memory", "shard": not self.shard}
        needed["placement"] = self.placement == "inprocess"
        reasons = {
            "cache": "states kept would be those of other company after an interruption; disk "
            "packs the same conversations always",
            "shard": "processes that share a target read one conversation at a time",
            "placement": "workers read one conversation at a time",
        }
        self.refuse_beside("pack_tokens", needed, reasons)

    def check_compiling(self) -> None:
        """Refuse what compiled layers do not go with."""
        if not self.compile:
            return
        needed = {"pack_tokens": self.pack_tokens is None, "shard": not self.shard}
        needed["engine"] = self.engine == "transformers"
        reasons = {
            "pack_tokens": "each number of conversations would be compiled by itself",
            "shard": "processes that share a target exchange data within its layers",
            "engine": "vLLM compiles the target itself; target.args are its options",
        }
        self.refuse_beside("compile", needed, reasons)

    def refuse_beside(self, option: str, needed: dict[str, bool], reasons: dict[str, str]) -> None:
        """InputError for the first option that does not fit beside another, with the reason."""
        for key, fits in needed.items():
            if not fits:
                own, other = (str(vars(self)[name]).lower() for name in (option, key))
                raise InputError(
                    f"target.{option}={own} and target.{key}={other} exclude each other: "
                    f"{reasons[key]}"
                )

    @property
    def gpus(self) -> int:
        """That the workers have, together."""
        return self.workers * self.tp_size

    @property
    def own_gpus(self) -> int:
        """That a training's own workers have; of shared ones nobody can say whose they are."""
        return self.gpus if (self.placement, self.share) == ("ray", "none") else 0
