"""One EAGLE-3 training step of SpecForge 0.2.0, through the installed package, timed.

    cd benchmarks && python -m peers.specforge_step FILE --shape JSON --threads 2 --steps 3

Runs in the environment that benchmarks/train_step.py makes. The package's fused loss is a Triton
kernel; on a CPU its own eager `_compute_loss` stands in.
"""

import json
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peers.inputs import Chats, Shape, load
from peers.measure import arguments, measure


def build(
    shape: Shape, weights: dict[str, Tensor], device: str, dtype: torch.dtype
) -> tuple[Any, Any]:
    """SpecForge's draft and its training strategy, the teacher compacted to the draft's columns."""
    import specforge.algorithms.eagle3.model as eagle3
    from specforge.core.loss import _compute_loss
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.modeling.target.target_head import TargetHead
    from specforge.training.strategies.base import Eagle3TrainStrategy
    from transformers import LlamaConfig

    if device == "cpu":
        eagle3.LogSoftmaxLoss = types.SimpleNamespace(apply=_compute_loss)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inter,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        num_hidden_layers=1,
        max_position_embeddings=8192,
        rms_norm_eps=shape.rms_eps,
        rope_theta=shape.rope_theta,
        pad_token_id=None,
        attention_bias=False,
    )
    config.draft_vocab_size = shape.draft_vocab
    config.fc_norm = False
    backend = "sdpa" if device == "cpu" else "flex_attention"
    draft = LlamaForCausalLMEagle3(config, attention_backend=backend)
    head_weight = weights.pop("target_head.weight")
    missing, unexpected = draft.load_state_dict(weights, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    draft.freeze_embedding()
    with tempfile.TemporaryDirectory() as folder:
        described = {"model_type": "llama", "hidden_size": shape.hidden, "num_hidden_layers": 1}
        described |= {"vocab_size": shape.vocab, "num_attention_heads": shape.heads}
        (Path(folder) / "config.json").write_text(json.dumps(described))
        head = TargetHead(folder)
    head.fc.weight.data.copy_(head_weight)
    head.freeze_weights()
    model = eagle3.OnlineEagle3Model(draft, length=shape.ttt, attention_backend=backend)
    return draft, Eagle3TrainStrategy(
        model.to(device, dtype),
        target_head=head.to(device, dtype),
        ploss_decay=0.8,
        compact_teacher=True,
    )


def make_batch(chats: Chats, device: str, dtype: torch.dtype) -> Any:
    """One padded batch in SpecForge's form."""
    from specforge.runtime.contracts import TrainBatch

    steps = torch.arange(chats.ids_BT.shape[1])
    tensors = {
        "input_ids": chats.ids_BT,
        "attention_mask": (steps < torch.tensor(chats.lengths)[:, None]).long(),
        "loss_mask": chats.mask_BT,
        "hidden_state": chats.aux_BTA.to(dtype),
        "target": chats.last_BTH.to(dtype),
    }
    return TrainBatch(
        sample_ids=[str(i) for i in range(len(chats.lengths))],
        strategy="eagle3",
        metadata={"target_repr": "hidden_state"},
        tensors={name: value.to(device) for name, value in tensors.items()},
    )


def main() -> None:
    """Print the medians as JSON."""
    args = arguments(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    weights, chats = load(args.file)
    draft, strategy = build(Shape(**json.loads(args.shape)), weights, args.device, dtype)
    batch = make_batch(chats, args.device, dtype)
    mask = chats.mask_BT
    del weights, chats
    losses = []

    def step() -> None:
        for weight in draft.parameters():
            if weight.grad is not None:
                weight.grad.zero_()
        loss = strategy.forward_loss(batch).loss
        loss.backward()
        losses.append(float(loss))

    found: dict[str, Any] = measure(step, args)
    rows = sum(int(mask[:, k:].sum()) for k in range(7))
    print(json.dumps({"who": "specforge", **found, "loss": losses[-1], "rows": rows}))


if __name__ == "__main__":
    main()
