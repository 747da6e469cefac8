"""One DFlash or DSpark training step of speculators 0.9.0, through the installed package, timed.

    cd benchmarks && python -m peers.speculators_dflash_step FILE --shape JSON --loss kl_div

Runs in the environment that benchmarks/train_step.py makes. Anchors are the file's: a function
that returns them stands in for `select_anchors`. Conversations are packed into one row, as its own
collator does. `--loss hard` is its `ce`, against the target's best token, which is the text's;
`kl_div` is its default. Both are divided by the number of labels, not by the sum of their weights;
the printed loss is at the latter. `dspark` is 0.1 ce + 0.9 tv.

Where the anchor's slot says a token, it counts a slot by the token in its place; here, as for
everybody, by the token that it is to say: its mask is the file's, one place on.
"""

from typing import Any

import torch
from torch import Tensor

from peers.dflash_inputs import SCALE, Shape, label_weights, packed_anchors
from peers.dflash_step import options, place, report
from peers.inputs import Chats, load

EPSILON = 1e-5
"""What its loss adds to the number of labels."""


def build(shape: Shape, weights: dict[str, Tensor], device: str) -> Any:
    """speculators' draft with our weights, over the whole vocabulary."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import Qwen3Config

    layer = Qwen3Config(**shape.qwen3)
    layer._attn_implementation = "sdpa" if device == "cpu" else "simple_flex_attention"
    proposal = GreedyTokenProposalConfig(speculative_tokens=len(shape.places))
    kind, config_kind, more = DFlashDraftModel, DFlashSpeculatorConfig, {}
    if shape.markov_rank:
        kind, config_kind = DSparkDraftModel, DSparkSpeculatorConfig
        more = {"markov_rank": shape.markov_rank, "markov_head_type": shape.markov_head}
    config = config_kind(
        **more,
        sample_from_anchor=shape.sample_from_anchor,
        sliding_window_non_causal=shape.non_causal,
        transformer_layer_config=layer,
        draft_vocab_size=shape.vocab,
        block_size=shape.block_size,
        aux_hidden_state_layer_ids=list(range(shape.features)),
        mask_token_id=shape.mask_token,
        speculators_config=SpeculatorsConfig(
            algorithm="dspark" if shape.markov_rank else "dflash",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    model = kind(config)
    weights["verifier_lm_head.weight"] = weights["lm_head.weight"]
    weights["verifier_norm.weight"] = torch.full((shape.hidden,), SCALE)
    model.load_state_dict(weights)
    return model


def make_inputs(shape: Shape, chats: Chats, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The conversations one after the other in one row; what counts, see above."""
    lengths = enumerate(chats.lengths)
    parts = [
        {
            "input_ids": chats.ids_BT[row, :length],
            "hidden_states": chats.aux_BTA[row, :length].to(dtype),
            "verifier_last_hidden_states": chats.last_BTH[row, :length].to(dtype),
            "loss_mask": chats.mask_BT[row, :length].bool().roll(-shape.sample_from_anchor),
            "position_ids": torch.arange(length),
            "document_ids": torch.full((length,), row),
        }
        for row, length in lengths
    ]
    return {n: torch.cat([part[n] for part in parts]).unsqueeze(0).to(device) for n in parts[0]}


def main() -> None:
    """Print the medians as JSON."""
    args = options(__doc__)
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import core

    device, dtype = place(args)
    weights, chats = load(args.file)
    shape = Shape.parse(args.shape)
    model = build(shape, weights, device).to(device, dtype)
    inputs = make_inputs(shape, chats, device, dtype)
    anchor_R = packed_anchors(chats).to(device)
    core.select_anchors = lambda *_: (anchor_R, torch.ones_like(anchor_R, dtype=torch.bool))
    del weights, chats
    name = {"hard": "ce", "kl_div": "kl_div", "dspark": '{"ce": 0.1, "tv": 0.9}'}[args.loss]
    choices: dict[str, Any] = {"gamma": shape.loss_gamma, "max_anchors": len(anchor_R)}
    kind = "eager" if device == "cpu" else "fused"
    choices["loss_config"] = resolve_loss_config(name, kind)
    if shape.weights == "dpace":
        choices["per_position_loss_weight"] = "dpace"
    if shape.markov_rank:
        choices["tv_loss_fn"] = resolve_loss_config("tv", kind)["tv"][0]
        choices["confidence_head_alpha"] = shape.confidence
    report(
        args,
        "speculators",
        model,
        lambda: model(**inputs, **choices)[1],
        lambda shape, chats: label_weights(shape, chats)[0] + EPSILON,
    )


if __name__ == "__main__":
    main()
