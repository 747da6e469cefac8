"""One P-EAGLE training step of ours, timed: what benchmarks/train_step.py --draft peagle runs.

    python benchmarks/our_peagle_step.py FILE --shape JSON --threads 2 --steps 3

With speculators' supervision, loss and rows (`peers.peagle_inputs`): a function that returns them
stands in for the one that draws them.
"""

import json
from dataclasses import replace

import parity
import torch
from our_step import packed, report
from peers.inputs import Shape, load
from peers.measure import arguments
from peers.peagle_inputs import drawn

from specforge_exp.config import LossConfig
from specforge_exp.drafts.kernels.check import use_kernels
from specforge_exp.drafts.peagle import draft as seam
from specforge_exp.losses import Loss, opd
from specforge_exp.target import Head


def main() -> None:
    """Print the medians as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="count what a step launches")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    shape = Shape(**json.loads(args.shape))
    weights, chats = load(args.file)
    head = Head(weights.pop("target_head.weight").to(args.device, dtype))
    meta = {**vars(shape), "mask_token_id": shape.vocab - 1}
    draft = parity.build_draft(weights, meta).to(args.device)
    draft.compute_dtype, draft.gradient_checkpointing = dtype, args.checkpointing
    rms_BT1 = chats.last_BTH.pow(2).mean(-1, keepdim=True) + shape.rms_eps
    normed = replace(chats, last_BTH=chats.last_BTH * torch.rsqrt(rms_BT1))  # as its verifier does
    sample = packed(normed, args.device, dtype)
    anchor_pos, depth = drawn(chats.mask_BT[0], shape.ttt)
    chains = parity.drawn({"anchor_pos": anchor_pos, "depth": depth, "loss_mask": chats.mask_BT})
    assert chains is not None
    cfg, loss = parity.options(meta, True, chains), Loss(opd, LossConfig(name="p", lambda_ce=1.0))
    del weights, chats, normed
    seam.make_chains = lambda cfg, batch: chains
    window_K = torch.stack([mask.sum() for mask in chains.supervised]).double()
    use_kernels(torch.device(args.device), draft.attention_heads)
    report(args, draft, lambda: draft(sample, head, loss, cfg, window_K)[1])


if __name__ == "__main__":
    main()
