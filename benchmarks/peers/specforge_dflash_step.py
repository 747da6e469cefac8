"""One DFlash training step of SpecForge 0.2.0, through the installed package, timed.

    cd benchmarks && python -m peers.specforge_dflash_step FILE --shape JSON --threads 2 --steps 3

Runs in the environment that benchmarks/train_step.py makes. Anchors are the file's: a function
that returns them stands in for the one that draws them. Several conversations are one padded batch,
as its collator makes; `--blocks` is its objective_chunk_blocks, by default its own default. Its
loss is the cross-entropy against the text, each label weighed by exp(-(k - 1) / gamma), over the
sum of the weights; it has no divergence from the target.
"""

from typing import Any

import torch
from torch import Tensor, nn

from peers.dflash_inputs import Shape, label_weights
from peers.dflash_step import options, place, report
from peers.inputs import Chats, load


def frozen(module: nn.Module, weight_VH: Tensor) -> nn.Module:
    """The target's embeddings or head."""
    module.load_state_dict({"weight": weight_VH})
    return module.requires_grad_(False)


def build(shape: Shape, weights: dict[str, Tensor], device: str, blocks: int | None) -> Any:
    """SpecForge's draft in its training model."""
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.modeling.draft.dflash import DFlashDraftModel
    from transformers import Qwen3Config

    config = Qwen3Config(
        **shape.qwen3,
        block_size=shape.block_size,
        num_target_layers=shape.features + 3,
        dflash_config={
            "mask_token_id": shape.mask_token,
            "target_layer_ids": list(range(shape.features)),
        },
    )
    backend = "sdpa" if device == "cpu" else "flex_attention"
    config._attn_implementation = backend
    embed = nn.Embedding(shape.vocab, shape.hidden)
    head = nn.Linear(shape.hidden, shape.vocab, bias=False)
    embed_VH, head_VH = weights.pop("embed_tokens.weight"), weights.pop("lm_head.weight")
    draft = DFlashDraftModel(config)
    draft.load_state_dict(weights)
    chunk = {} if blocks is None else {"objective_chunk_blocks": blocks}
    return OnlineDFlashModel(
        draft,
        frozen(head, head_VH),
        frozen(embed, embed_VH),
        shape.mask_token,
        block_size=shape.block_size,
        attention_backend=backend,
        loss_decay_gamma=shape.loss_gamma,
        **chunk,
    )


def make_batch(chats: Chats, device: str, dtype: torch.dtype) -> Any:
    """One padded batch in SpecForge's form."""
    from specforge.runtime.contracts import TrainBatch

    tensors = {
        "input_ids": chats.ids_BT,
        "loss_mask": chats.mask_BT,
        "hidden_states": chats.aux_BTA.to(dtype),
    }
    return TrainBatch(
        sample_ids=[str(i) for i in range(len(chats.lengths))],
        strategy="dflash",
        metadata={},
        tensors={name: value.to(device) for name, value in tensors.items()},
    )


def main() -> None:
    """Print the medians as JSON."""
    args = options(__doc__)
    from specforge.training.strategies.base import DFlashTrainStrategy

    assert args.loss == "hard", "SpecForge's DFlash has no other"
    device, dtype = place(args)
    shape = Shape.parse(args.shape)
    weights, chats = load(args.file)
    model = build(shape, weights, device, args.blocks).to(device, dtype)
    strategy = DFlashTrainStrategy(model)
    batch = make_batch(chats, device, dtype)
    anchor_BR = chats.anchor_BR.to(device)
    kept_BR = anchor_BR >= 0
    model._sample_anchor_positions = lambda *_: (anchor_BR.clamp(min=0), kept_BR)
    del weights, chats
    report(
        args,
        "specforge",
        model.draft_model,
        lambda: strategy.forward_loss(batch).loss,
        lambda shape, chats: label_weights(shape, chats)[1],
    )


if __name__ == "__main__":
    main()
