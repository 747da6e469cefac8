"""Loss and gradients of one small step of speculators 0.9.0, recorded for benchmarks/parity.py.

    cd benchmarks && python -m peers.speculators_record FILE --options '{"fc_norm": true}'

Runs in the environment that benchmarks/train_step.py makes, in fp32 on a CPU, with speculators' own
eager attention and losses. `--options` are entries of its configuration and of its layer's
(num_hidden_layers, sliding_window, layer_types); `--shape` sizes that differ, `--loss` its loss.

    python -m peers.speculators_record FILE --options '{"mask_token_id": 159}'

records a step of its P-EAGLE, with the anchors and depths that it drew (in/anchor_pos, in/depth).
"""

import argparse
import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peers.inputs import Shape, make_chats, make_weights, vocabulary
from peers.speculators_step import build, make_inputs

SHAPE = Shape(
    hidden=32, inter=48, heads=4, kv_heads=2, head_dim=8, vocab=160, draft_vocab=96, ttt=5
)


def all_weights(shape: Shape, options: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """The first layer's and what the options add."""
    weights = make_weights(shape, seed)
    g = torch.Generator().manual_seed(seed + 1)
    plain = [name for name in weights if name.startswith("midlayer.") and "hidden_norm" not in name]
    for number in range(1, options.get("num_hidden_layers", 1)):
        for name in plain:
            value = weights[name]
            if name.split(".")[2] in ("q_proj", "k_proj", "v_proj"):
                value = value[:, : shape.hidden]
            noise = torch.randn(value.shape, generator=g) * (0.1 if value.dim() == 1 else 0.2)
            weights[name.replace("midlayer", f"layers.{number}")] = value + noise * value.std()
    if options.get("norm_before_fc"):
        size = shape.features * shape.hidden
        weights["input_norm.weight"] = 1 + 0.1 * torch.randn(size, generator=g)
    for part in range(shape.features if options.get("fc_norm") else 0):
        weights[f"fc_norm.{part}.weight"] = 1 + 0.1 * torch.randn(shape.hidden, generator=g)
    if "mask_token_id" in options:
        weights["mask_hidden"] = torch.randn(1, 1, shape.features * shape.hidden, generator=g)
    return weights


def step(
    model: Any, inputs: dict[str, Tensor], shape: Shape, loss: str, decay: float
) -> tuple[Tensor, dict[str, Any]]:
    """The loss, and what it is made of: of every step, or of P-EAGLE with what was drawn."""
    from speculators.losses import resolve_loss_config
    from speculators.models.peagle import core

    options: dict[str, Any] = {"loss_config": resolve_loss_config(loss, "eager")}
    if not hasattr(model, "mask_hidden"):
        options |= {"ttt_steps": shape.ttt, "ttt_step_loss_decay": decay}
        _, total, metrics = model(**inputs, **options)
        return total, {"step_loss": [float(metrics[f"loss_{k}_sum"]) for k in range(shape.ttt)]}
    theirs, drawn = core.generate_cod_sample_indices, []

    def drawing(**arguments: Any) -> Any:
        drawn.append(theirs(**arguments))
        return drawn[0]

    core.generate_cod_sample_indices = drawing
    _, total, _ = model(**inputs, **options, num_depths=shape.ttt)
    anchor_pos, depth = drawn[0]
    return total, {"in/anchor_pos": anchor_pos.numpy(), "in/depth": depth.numpy()}


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--shape", type=json.loads, default={})
    parser.add_argument("--loss", default="kl_div")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    shape, decay = replace(SHAPE, **args.shape), 0.8
    weights = all_weights(shape, args.options, args.seed)
    chats = make_chats(shape, [args.tokens], 0.25, args.seed + 2)
    weights |= vocabulary(shape, weights, [chats])
    model = build(shape, dict(weights), "cpu", torch.float32, {"attn": "eager", **args.options})
    inputs = make_inputs(chats, "cpu", torch.float32)
    loss, parts = step(model, inputs, shape, args.loss, decay)
    loss.backward()
    arrays = {f"w/{name}": value.numpy() for name, value in weights.items()}
    arrays |= {
        "in/input_ids": chats.ids_BT.numpy(), "in/aux_hidden_states": chats.aux_BTA.numpy(),
        "in/last_hidden_states": chats.last_BTH.numpy(), "in/loss_mask": chats.mask_BT.numpy(),
    }  # fmt: skip
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            arrays[f"g/{name}"] = weight.grad.numpy()
    meta = {
        **args.options, "ttt": shape.ttt, "decay": decay, "loss_fn": args.loss, "seed": args.seed,
        "head_dim": shape.head_dim, "rope_theta": shape.rope_theta, "rms_eps": shape.rms_eps,
    }  # fmt: skip
    arrays |= {name: np.asarray(value) for name, value in parts.items()}
    np.savez_compressed(
        args.file, allow_pickle=False, loss=float(loss.detach()),
        meta=np.array(json.dumps(meta)), **arrays,
    )  # fmt: skip


if __name__ == "__main__":
    main()
