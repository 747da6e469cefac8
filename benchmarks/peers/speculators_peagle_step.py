"""One P-EAGLE training step of speculators 0.9.0, through the installed package, timed.

    cd benchmarks && python -m peers.speculators_peagle_step FILE --shape JSON --threads 2 --steps 3

Runs in the environment that benchmarks/train_step.py makes; the rows are `peagle_inputs.drawn`'s,
its head is unfrozen and its embeddings are frozen, as everybody else's are.
"""

from torch import Tensor

from peers.inputs import load
from peers.peagle_inputs import drawn
from peers.speculators_step import build, make_inputs, setting, timed


def main() -> None:
    """Print the medians as JSON."""
    how = setting(__doc__)
    args, dtype, shape = how.args, how.dtype, how.shape
    from speculators.models.peagle import core

    weights, chats = load(args.file)
    layers = 1 + len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    options = {"mask_token_id": shape.vocab - 1, "num_hidden_layers": layers}
    model = build(shape, weights, args.device, dtype, options)
    inputs = make_inputs(chats, args.device, dtype)
    rows = tuple(x.to(args.device) for x in drawn(chats.mask_BT[0], shape.ttt))
    core.generate_cod_sample_indices = lambda **_: rows
    del weights, chats

    def forward() -> tuple[Tensor, float]:
        _, loss, metrics = model(**inputs, num_depths=shape.ttt, loss_config=how.loss_config)
        return loss, float(metrics["full_acc_total"])

    timed(how, model, forward)


if __name__ == "__main__":
    main()
