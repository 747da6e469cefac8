"""One P-EAGLE training step of speculators 0.9.0, through the installed package, timed.

    cd benchmarks && python -m peers.speculators_peagle_step FILE --shape JSON --threads 2 --steps 3

Runs in the environment that benchmarks/train_step.py makes; the rows are `peagle_inputs.drawn`'s,
its head is unfrozen and its embeddings are frozen, as everybody else's are.
"""

import json
import warnings
from typing import Any

import torch

from peers.inputs import Shape, load
from peers.measure import arguments, measure
from peers.peagle_inputs import drawn
from peers.speculators_step import build, make_inputs


def main() -> None:
    """Print the medians as JSON."""
    args = arguments(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    from speculators.losses import resolve_loss_config
    from speculators.models.peagle import core

    cuda = args.device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    shape = Shape(**json.loads(args.shape))
    weights, chats = load(args.file)
    layers = 1 + len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    options = {"mask_token_id": shape.vocab - 1, "num_hidden_layers": layers}
    model = build(shape, weights, args.device, dtype, options)
    inputs = make_inputs(chats, args.device, dtype)
    rows = tuple(x.to(args.device) for x in drawn(chats.mask_BT[0], shape.ttt))
    core.generate_cod_sample_indices = lambda **_: rows
    loss_config = resolve_loss_config("kl_div", "fused" if cuda else "eager")
    del weights, chats
    said: list[tuple[float, float]] = []

    def step() -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.zero_()
        _, loss, metrics = model(**inputs, num_depths=shape.ttt, loss_config=loss_config)
        loss.backward()
        said[:] = [(float(loss), float(metrics["full_acc_total"]))]

    found: dict[str, Any] = measure(step, args)
    loss, counted = said[0]
    print(json.dumps({"who": "speculators", **found, "loss": loss, "rows": int(counted)}))


if __name__ == "__main__":
    main()
