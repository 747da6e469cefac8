"""One EAGLE-3 training step of speculators 0.9.0, through the installed package, timed.

    cd benchmarks && python -m peers.speculators_step FILE --shape JSON --threads 2 --steps 3

Runs in the environment that benchmarks/train_step.py makes. Its head is unfrozen, as everybody
else's is trained; several conversations are packed into one row, as its own collator does.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peers.inputs import Chats, Shape, load
from peers.measure import arguments, measure


def configured(shape: Shape, device: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Configuration and class of speculators' draft; see `build`."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    own = {"norm_output": False, "norm_before_fc": False, "norm_before_residual": False}
    own |= options
    of_layer = {"num_hidden_layers": 1, "sliding_window": None, "layer_types": None}
    of_layer = {name: own.pop(name, value) for name, value in of_layer.items()}
    attention = own.pop("attn", "sdpa" if device == "cpu" else "simple_flex_attention")
    layer = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inter,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        rms_norm_eps=shape.rms_eps,
        rope_theta=shape.rope_theta,
        attention_bias=False,
        **of_layer,
    )
    layer._attn_implementation = attention
    proposal = GreedyTokenProposalConfig(speculative_tokens=shape.ttt)
    kind, algorithm = (Eagle3SpeculatorConfig, Eagle3DraftModel), "eagle3"
    if "mask_token_id" in own:
        kind, algorithm = (PEagleSpeculatorConfig, PEagleDraftModel), "peagle"
    config = kind[0](
        transformer_layer_config=layer,
        draft_vocab_size=shape.draft_vocab,
        embed_requires_grad=False,
        **own,
        speculators_config=SpeculatorsConfig(
            algorithm=algorithm,
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    return config, kind[1]


def build(
    shape: Shape,
    weights: dict[str, Tensor],
    device: str,
    dtype: torch.dtype,
    options: dict[str, Any] | None = None,
) -> Any:
    """speculators' draft with our weights; its verifier norm has unit weight.

    `options` are entries of its configuration, and the layer's: num_hidden_layers, sliding_window,
    layer_types, attn (its implementation). One with mask_token_id is P-EAGLE's, its embeddings
    frozen as everybody else's are.
    """
    config, kind = configured(shape, device, options or {})
    model = kind(config)
    head_weight = weights.pop("target_head.weight")
    state = {name.replace("midlayer.", "layers.0."): value for name, value in weights.items()}
    state["verifier_lm_head.weight"] = head_weight[weights["t2d"]]
    state["verifier_norm.weight"] = torch.ones(shape.hidden)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    model = model.to(device, dtype)
    model.lm_head.weight.requires_grad_(True)
    return model


def make_inputs(chats: Chats, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The conversations, each shifted by speculators' own function, in one row."""
    from speculators.models.eagle3.data import shift_batch

    parts = []
    for row, length in enumerate(chats.lengths):
        shifted = shift_batch(
            {
                "input_ids": chats.ids_BT[row, :length],
                "hidden_states": chats.aux_BTA[row, :length].to(dtype),
                "verifier_last_hidden_states": chats.last_BTH[row, :length].to(dtype),
                "loss_mask": chats.mask_BT[row, :length].bool(),
                "lengths": torch.tensor([length]),
                "position_ids": torch.arange(length),
            }
        )
        shifted["document_ids"] = torch.full_like(shifted["input_ids"], row)
        parts.append(shifted)
    names = [name for name in parts[0] if name != "lengths"]
    return {n: torch.cat([part[n] for part in parts]).unsqueeze(0).to(device) for n in names}


class Setting(NamedTuple):
    """What a step is made of, as the command line says."""

    args: argparse.Namespace
    dtype: torch.dtype
    shape: Shape
    loss_config: Any


def setting(description: str | None) -> Setting:
    """Read the command line; speculators' default loss, in the implementation for the device."""
    args = arguments(description).parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    from speculators.losses import resolve_loss_config

    cuda = args.device.startswith("cuda")
    loss_config = resolve_loss_config("kl_div", "fused" if cuda else "eager")
    dtype = torch.bfloat16 if cuda else torch.float32
    return Setting(args, dtype, Shape(**json.loads(args.shape)), loss_config)


def timed(how: Setting, model: Any, forward: Callable[[], tuple[Tensor, float]]) -> None:
    """Time steps and print the medians as JSON.

    Args:
        how: of the command line.
        model: what has the gradients.
        forward: one of it: its loss, and how many rows count.
    """
    said: list[tuple[float, float]] = []

    def step() -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.zero_()
        loss, rows = forward()
        loss.backward()
        said[:] = [(float(loss), rows)]

    found: dict[str, Any] = measure(step, how.args)
    loss, rows = said[0]
    print(json.dumps({"who": "speculators", **found, "loss": loss, "rows": int(rows)}))


def main() -> None:
    """Print the medians as JSON."""
    how = setting(__doc__)
    args, dtype, shape = how.args, how.dtype, how.shape
    weights, chats = load(args.file)
    model = build(shape, weights, args.device, dtype)
    inputs = make_inputs(chats, args.device, dtype)
    del weights, chats
    options: dict[str, Any] = {"ttt_steps": shape.ttt, "ttt_step_loss_decay": 0.8}
    options["loss_config"] = how.loss_config

    def forward() -> tuple[Tensor, float]:
        _, loss, metrics = model(**inputs, **options)
        return loss, sum(float(metrics[f"full_acc_{k}_total"]) for k in range(shape.ttt))

    timed(how, model, forward)


if __name__ == "__main__":
    main()
