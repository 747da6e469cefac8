"""What the peers' DFlash steps share: their options, the timed step, and the recording.

With `--record OUT.npz` a peer writes its inputs, loss and gradients instead of timing anything:
what tests/parity/dflash holds.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peers.dflash_inputs import Shape, label_weights
from peers.inputs import Chats, load
from peers.measure import arguments, measure


def options(description: str | None) -> argparse.Namespace:
    """What the command line says; also sets the threads."""
    parser = arguments(description)
    parser.add_argument("--loss", choices=["hard", "kl_div", "dspark"], default="hard")
    parser.add_argument("--blocks", type=int, help="SpecForge: blocks whose logits exist together")
    parser.add_argument("--record", type=Path, help="write loss and gradients to this .npz file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    return args


def place(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """Device and data type: bfloat16 on CUDA, as for EAGLE-3."""
    return args.device, torch.bfloat16 if args.device.startswith("cuda") else torch.float32


def report(
    args: argparse.Namespace,
    who: str,
    draft: nn.Module,
    loss: Callable[[], Tensor],
    divisor: Callable[[Shape, Chats], float],
) -> None:
    """Time steps and print the medians as JSON, or record one step.

    Args:
        args: the command line.
        who: the peer's name.
        draft: what has the gradients.
        loss: one forward; a scalar.
        divisor: what the peer divides its weighted sum by. The printed loss is at the sum of the
            weights instead, which is SpecForge's and ours.
    """
    losses: list[float] = []

    def step() -> None:
        for weight in draft.parameters():
            if weight.grad is not None:
                weight.grad.zero_()
        value = loss()
        value.backward()
        losses.append(float(value))

    shape = Shape.parse(args.shape)
    _, chats = load(args.file)
    rows, weight = label_weights(shape, chats)
    divided = divisor(shape, chats)
    del chats
    if args.record:
        step()
        record(args, draft, losses[0], {"who": who, "loss": args.loss, "divisor": divided})
        return
    found: dict[str, Any] = measure(step, args)
    found |= {"loss": losses[-1] * divided / weight, "rows": rows}
    print(json.dumps({"who": who, **found}))


def record(args: argparse.Namespace, draft: nn.Module, loss: float, meta: dict[str, Any]) -> None:
    """The inputs with the peer's own loss and gradients beside them."""
    with np.load(args.file, allow_pickle=False) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    for name, weight in draft.named_parameters():
        if weight.grad is not None:
            kept[f"g/{name}"] = weight.grad.numpy()
    meta |= {"shape": json.loads(args.shape)}
    kept |= {"loss": np.array(loss), "meta": np.array(json.dumps(meta))}
    np.savez_compressed(args.record, allow_pickle=False, **kept)
