"""One DFlash training step of ours, timed: what benchmarks/train_step.py --draft dflash runs.

    python benchmarks/our_dflash_step.py FILE --shape JSON --threads 2 --steps 3

Anchors are the file's: a function that returns them stands in for the one that draws them.
`--loss hard` is the cross-entropy against the text; `--loss kl_div` is our soft cross-entropy, its
value reported without the target's entropy, a constant: speculators' default.
"""

from typing import Any

import torch
from our_step import packed, report
from peers.dflash_inputs import Shape, packed_anchors
from peers.inputs import Chats, load
from peers.measure import arguments
from torch import Tensor
from transformers import Qwen3Config

from specforge_exp.config import LossConfig
from specforge_exp.drafts.dflash import draft as seam
from specforge_exp.drafts.dflash.blocks import Blocks, labels
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.drafts.dflash.training import decays
from specforge_exp.drafts.dspark.config import DSparkConfig
from specforge_exp.drafts.dspark.draft import DSpark
from specforge_exp.drafts.kernels.check import use_kernels
from specforge_exp.drafts.rows import document_bounds
from specforge_exp.losses import Loss, opd
from specforge_exp.target import Head
from specforge_exp.training.objective import Outcome, Sample

TERMS: dict[str, dict[str, Any]] = {
    "hard": {"lambda_hard": 1.0},
    "kl_div": {"lambda_ce": 1.0},
    "dspark": {"lambda_hard": 0.1, "lambda_tv": 0.9},
}


def build(shape: Shape, weights: dict[str, Tensor]) -> DFlash:
    """A draft with the file's weights; embeddings and head are taken out of them."""
    config = Qwen3Config(
        **shape.qwen3,
        block_size=shape.block_size,
        mask_token_id=shape.mask_token,
        sample_from_anchor=shape.sample_from_anchor,
        sliding_window_non_causal=shape.non_causal,
        window="block",
        markov_rank=shape.markov_rank,
        markov_head_type=shape.markov_head,
        enable_confidence_head=True,
        confidence_head_with_markov=True,
        target_layers=list(range(shape.features)),
    )
    embed_VH, head_VH = weights.pop("embed_tokens.weight"), weights.pop("lm_head.weight")
    draft = (DSpark if shape.markov_rank else DFlash)(config, embed_VH, head_VH)
    draft.load_state_dict(weights)
    return draft


def given_blocks(shape: Shape, chats: Chats, sample: Sample) -> Blocks:
    """The blocks that start at the file's anchors."""
    start_T, end_T = document_bounds(sample.lengths, torch.device("cpu"))
    anchor_R = packed_anchors(chats).cpu()
    places = len(shape.places)
    return Blocks(anchor_R, start_T, end_T, labels(sample, end_T, anchor_R, places))


def entropy(cfg: DFlashConfig, blocks: Blocks, sample: Sample, head_VH: Tensor) -> float:
    """The target's entropy, its sum weighed as the loss weighs its labels."""
    decay_K = decays(cfg)
    row_N, place_N = blocks.counts_RK.nonzero(as_tuple=True)
    weight_T = torch.zeros(len(sample.ids_T), device=row_N.device)
    at_N = blocks.anchor_R[row_N] + place_N
    weight_T.index_add_(0, at_N, decay_K.to(weight_T)[place_N])
    total = torch.zeros(())
    for at_P in weight_T.nonzero()[:, 0].split(16):
        logp_PV = torch.log_softmax((sample.last_TH[at_P] @ head_VH.T).float(), -1)
        entropy_P = -(logp_PV.exp() * logp_PV).sum(-1)
        total = total + (weight_T[at_P] * entropy_P).sum().cpu()
    return float(total)


def prepare(args: Any, dtype: torch.dtype | None = None) -> tuple[DFlash, Any, float]:
    """The draft, a function that gives the step's outcome, and what its loss has too much; by
    default in bfloat16 on CUDA."""
    shape = Shape.parse(args.shape)
    dtype = dtype or (torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    weights, chats = load(args.file)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name].to(args.device, dtype)
    draft = build(shape, weights).to(args.device)
    draft.compute_dtype, draft.gradient_checkpointing = dtype, args.checkpointing
    sample = packed(chats, args.device, dtype)
    blocks = given_blocks(shape, chats, sample)
    seam.make_blocks = lambda *_: blocks
    cfg = DSparkConfig(
        name="peer",
        block_size=shape.block_size,
        loss_gamma=shape.loss_gamma,
        position_weights=shape.weights,
        sample_from_anchor=shape.sample_from_anchor,
        confidence_weight=shape.confidence,
    )
    loss = Loss(opd, LossConfig(name="peer", **TERMS[args.loss]))
    divisors_K = blocks.counts_RK.sum(0).double().cpu()
    if args.divisor is not None:  # the label after the anchor weighs 1
        divisors_K = torch.zeros_like(divisors_K)
        divisors_K[0] = args.divisor

    def outcome() -> Outcome:
        found: Outcome = draft(sample, Head(draft.head_VH), loss, cfg, divisors_K)[1]
        return found

    extra = entropy(cfg, blocks, sample, draft.head_VH) if args.loss == "kl_div" else 0.0
    return draft, outcome, extra / float((decays(cfg) * divisors_K).sum())


def main() -> None:
    """Print the medians as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--loss", choices=TERMS, default="hard")
    parser.add_argument("--divisor", type=float, help="of the loss; default: the labels' weights")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="count what a step launches")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    draft, outcome, extra = prepare(args)
    use_kernels(torch.device(args.device), draft.attention_heads)  # as where a training starts
    report(args, draft, outcome, extra)


if __name__ == "__main__":
    main()
