"""One EAGLE-3 training step of ours, timed: what benchmarks/train_step.py runs.

    python benchmarks/our_step.py FILE --shape JSON --threads 2 --steps 3

By default with SpecForge's supervision and loss, so that rows and loss must be SpecForge's too.
The draft is called as a training calls it: weights are narrowed once, kernels are used.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import parity
import torch
from peers.inputs import Chats, Shape, load
from peers.measure import arguments, matmul_rate, measure

from specforge_exp.config import LossConfig
from specforge_exp.drafts import layers
from specforge_exp.drafts.draft import Draft
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.kernels.check import use_kernels
from specforge_exp.losses import Loss, opd
from specforge_exp.target import Head
from specforge_exp.training.objective import Outcome, Sample


def packed(chats: Chats, device: str, dtype: torch.dtype) -> Sample:
    """The conversations one after the other, without padding."""
    ids, mask, aux, last = (
        torch.cat([value[row, :length] for row, length in enumerate(chats.lengths)])
        for value in (chats.ids_BT, chats.mask_BT, chats.aux_BTA, chats.last_BTH)
    )
    numbers = list(range(len(chats.lengths)))
    aux, last = aux.to(device, dtype), last.to(device, dtype)
    return Sample(ids.to(device), mask, numbers, chats.lengths, 0, aux, last)


def report(
    args: argparse.Namespace, draft: Draft[Any], outcome: Callable[[], Outcome], extra: float = 0.0
) -> None:
    """Time steps and print the medians as JSON.

    Args:
        args: the command line.
        draft: what has the gradients.
        outcome: one forward.
        extra: taken off the loss that is printed.
    """
    outcomes: list[Any] = []

    def step() -> None:
        for weight in draft.parameters():
            if weight.grad is not None:
                weight.grad.zero_()
        found = outcome()
        found.loss.backward()
        outcomes[:] = [(float(found.loss), int(found.sums["rows"].sum()), found.flops)]

    rate = 0.0 if args.instructions else matmul_rate(args.device, draft.compute_dtype)
    found: dict[str, Any] = measure(step, args)
    if args.profile:
        found["profile"] = profiled(step, args.device)
    value, rows, flops = outcomes[0]
    found |= {"loss": value - extra, "rows": rows, "flops": flops}
    if not args.instructions:
        rate = (rate + matmul_rate(args.device, draft.compute_dtype)) / 2
        found["matmul_share"] = flops / found["wall_s"] / rate
    ways = [way for way in ("checkpointing", "in_order") if getattr(args, way, False)]
    print(json.dumps({"who": "+".join(["ours", *ways]), **found}))


def profiled(step: Callable[[], None], device: str) -> dict[str, Any]:
    """What one step launches and waits for: operators, kernels and synchronisations on CUDA, and
    the ten that take longest, with their milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    largest = sorted(averages, key=lambda entry: -getattr(entry, time))[:10]
    counts = {
        name: sum(entry.count for entry in averages if entry.key.startswith(prefixes))
        for name, prefixes in {
            "operators": ("aten::",),
            "launches": ("cudaLaunchKernel", "cuLaunchKernel"),
            "synchronisations": ("cudaStreamSynchronize", "cudaEventSynchronize"),
            "copies": ("cudaMemcpyAsync",),
        }.items()
    }
    table = [[entry.key, entry.count, getattr(entry, time) / 1000] for entry in largest]
    return {**counts, "largest": table}


def main() -> None:
    """Print the medians as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--supervision", default="specforge")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="count what a step launches")
    parser.add_argument(
        "--in-order", action="store_true", help="on a GPU as on a CPU: more kernels"
    )
    args = parser.parse_args()
    layers.IN_ORDER["cuda"] |= args.in_order
    torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    shape = Shape(**json.loads(args.shape))
    weights, chats = load(args.file)
    head = Head(weights.pop("target_head.weight").to(args.device, dtype))
    draft = parity.build_draft(
        weights, {**vars(shape), "rms_eps": shape.rms_eps, "head_dim": shape.head_dim}
    ).to(args.device)
    draft.compute_dtype, draft.gradient_checkpointing = dtype, args.checkpointing
    if not args.in_order:
        use_kernels(torch.device(args.device), draft.attention_heads)
    sample = packed(chats, args.device, dtype)
    padded = float(len(chats.lengths) * max(chats.lengths))
    del weights, chats
    cfg = Eagle3Config(name="peer", ttt_length=shape.ttt, supervision=args.supervision)
    loss = Loss(opd, LossConfig(name="peer", lambda_ce=1.0))
    divisors_K = draft.denominators(cfg, sample)
    if args.supervision == "specforge":  # it divides by the padding, too
        divisors_K.fill_(padded)
    report(args, draft, lambda: draft(sample, head, loss, cfg, divisors_K)[1])


if __name__ == "__main__":
    main()
