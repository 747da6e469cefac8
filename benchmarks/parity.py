"""Compare our losses and gradients with a peer's, recorded in .npz files.

    python benchmarks/parity.py [--device cpu|cuda] [--dtype float32|bfloat16] FILE.npz...

A file with `step_loss` is speculators' (each step already multiplied by decay**k), one with
`ploss` SpecForge's (not multiplied). `meta` says what the draft has of EAGLE-3.1: fc_norm,
norm_output, norm_before_fc, norm_before_residual, sliding_window with layer_types; the arrays have
its layers (midlayer or layers.0 is the first). A file with in/anchor_pos and in/depth is a step of
speculators' P-EAGLE, with what it drew; meta has its mask_token_id. `peers.speculators_record`
writes such files. A file with in/anchors is a step of a peer's DFlash or DSpark, as
`peers.speculators_dflash_step INPUTS --record FILE` writes it. loss_rel is the largest relative
difference of a step's loss, grad_rel the largest difference of a gradient relative to the largest
entry of its tensor.
The last line is JSON; the exit status is 1 when a file is above the tolerances, which are those of
float32 on a CPU. With another device or dtype the differences are what one looks at.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from specforge_exp.config import DraftConfig, LossConfig
from specforge_exp.drafts.dflash import draft as dflash
from specforge_exp.drafts.eagle3.chains import chains_of
from specforge_exp.drafts.eagle3.config import Eagle3Config, Variant
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.drafts.peagle import draft as peagle
from specforge_exp.drafts.peagle.config import PEagleConfig
from specforge_exp.drafts.rows import Chains
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, opd
from specforge_exp.target import Head
from specforge_exp.training.objective import Outcome, Sample

LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 2e-5
"""Both sides round, each as its CPU does: a recorded gradient is off by 7e-6 with ours in fp64, by
1.5e-5 on a CPU with AVX-512, by 0.8e-5 elsewhere."""
NORMS = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
SPECFORGE_HAS = ("fc_norm",)
"""Of those, what SpecForge 0.2.0 means by the name as speculators does."""
SPECULATORS_TERMS = {
    "kl_div": "lambda_ce",
    "rkl": "lambda_rkl",
    "tv": "lambda_tv",
    "nla": "lambda_lk_alpha",
}
SPECFORGE_TERMS = {"none": "lambda_ce", "alpha": "lambda_lk_alpha", "lambda": "lambda_lk"}


def loss_config(meta: dict[str, Any], speculators: bool) -> LossConfig:
    """The weights that a file's `loss_fn` (a name or a JSON mixture) or `lk` means."""
    if speculators:
        text = meta.get("loss_fn", "kl_div")
        mixture = json.loads(text) if text.lstrip().startswith("{") else {text: 1.0}
        known = SPECULATORS_TERMS
    else:
        mixture = {meta.get("lk", "none"): 1.0}
        known = SPECFORGE_TERMS
    unknown = [name for name in mixture if name not in known]
    if unknown:
        raise InputError(f"loss {', '.join(unknown)} is not known; known: {', '.join(known)}")
    weights: dict[str, Any] = {known[name]: float(w) for name, w in mixture.items()}
    return LossConfig(name="peer", **weights)


def variant(meta: dict[str, Any], names: Iterable[str]) -> Variant:
    """What the file's draft has of EAGLE-3.1."""
    further = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
    number, window = 1 + len(further), meta.get("sliding_window")
    kinds = meta.get("layer_types") or ["full_attention"] * number
    window = window if "sliding_attention" in kinds else None
    full = [n for n, kind in enumerate(kinds) if kind == "full_attention"] if window else []
    norms = {name: bool(meta.get(name)) for name in NORMS}
    return Variant(number, **norms, sliding_window=window, full_attention_layers=full)


def ours(name: str) -> str:
    """A peer's name of a weight, as ours."""
    return name.replace("layers.0.", "midlayer.")


def llama_config(weights: dict[str, Tensor], meta: dict[str, Any]) -> LlamaConfig:
    """Sizes, from the arrays."""
    H, V = weights["fc.weight"].shape[0], weights["embed_tokens.weight"].shape[0]
    E = int(meta["head_dim"])
    return LlamaConfig(
        hidden_size=H,
        target_hidden_size=weights["fc.weight"].shape[1] // 3,
        intermediate_size=weights["midlayer.mlp.gate_proj.weight"].shape[0],
        num_attention_heads=weights["midlayer.self_attn.q_proj.weight"].shape[0] // E,
        num_key_value_heads=weights["midlayer.self_attn.k_proj.weight"].shape[0] // E,
        head_dim=E,
        rms_norm_eps=meta["rms_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["rope_theta"]},
        vocab_size=V,
        draft_vocab_size=weights["lm_head.weight"].shape[0],
    )


def build_draft(weights: dict[str, Tensor], meta: dict[str, Any]) -> Any:
    """A draft with the file's weights: P-EAGLE's with a learnt mask among them."""
    weights = {ours(name): value for name, value in weights.items()}
    weights.pop("target_head.weight", None)
    config = llama_config(weights, meta)
    embed_VH, own = weights.pop("embed_tokens.weight"), variant(meta, weights)
    config.mask_token_id = meta.get("mask_token_id")
    kind: Any = peagle.PEagle if "mask_hidden" in weights else Eagle3
    draft = kind(config, embed_VH, weights["d2t"], weights["t2d"], own)
    draft.load_state_dict(weights)
    return draft


def drawn(inputs: dict[str, Tensor]) -> Chains | None:
    """The rows of what speculators' P-EAGLE drew, where the file has it."""
    if "anchor_pos" not in inputs:
        return None
    anchor_N, depth_N = inputs["anchor_pos"].cpu(), inputs["depth"].cpu()
    mask_T = inputs["loss_mask"][0].cpu() > 0
    masks = [torch.zeros_like(mask_T) for _ in range(int(depth_N.max()) + 1)]
    counts_N = mask_T[anchor_N + 1 + depth_N]
    for depth, taken_T in enumerate(masks):
        taken_T[anchor_N[counts_N & (depth_N == depth)]] = True
    return chains_of(masks, [len(mask_T)])


def options(meta: dict[str, Any], speculators: bool, chains: Chains | None) -> DraftConfig:
    """The draft's."""
    if chains is not None:
        return PEagleConfig(name="peer", num_depths=len(chains.counts), supervision="speculators")
    return Eagle3Config(
        name="peer",
        ttt_length=int(meta["ttt"]),
        ttt_decay=meta["decay" if speculators else "ploss_decay"],
        supervision="speculators" if speculators else "specforge",
    )


def run(
    arrays: Any, meta: dict[str, Any], speculators: bool, device: str, dtype: torch.dtype
) -> tuple[Any, Outcome]:
    """One forward and backward of the peer's preset on the file's weights and inputs."""
    tensors = {k: torch.from_numpy(arrays[k]).to(device) for k in arrays.files if "/" in k}
    weights = {k[2:]: value for k, value in tensors.items() if k.startswith("w/")}
    inputs = {k[3:]: value for k, value in tensors.items() if k.startswith("in/")}
    draft = build_draft(weights, meta).to(device)
    draft.compute_dtype = dtype
    last = inputs["last_hidden_states"].float()
    if speculators:  # its verifier norm has unit weight and the stored states are from before it
        last = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + meta["rms_eps"])
    chains = drawn(inputs)
    cfg = options(meta, speculators, chains)
    # Padding on the right stays: it is never seen, and SpecForge divides by it too.
    lengths = [inputs["input_ids"].shape[1]] * len(inputs["input_ids"])
    turns = (inputs["loss_mask"] > 0).long().flatten().cpu()
    aux = inputs["aux_hidden_states"].to(dtype).flatten(0, 1)
    ids, numbers = inputs["input_ids"].flatten(), list(range(len(lengths)))
    sample = Sample(ids, turns, numbers, lengths, 0, aux, last.to(dtype).flatten(0, 1))
    loss = Loss(opd, loss_config(meta, speculators))
    head = Head(weights["target_head.weight"].to(dtype))
    with patch.object(peagle, "make_chains", lambda cfg, sample: chains):
        window_K = draft.denominators(cfg, sample)
        if chains is not None:
            window_K = torch.stack([mask.sum() for mask in chains.supervised]).double()
        outcome = draft.objective(sample, head, loss, cfg, window_K)
    outcome.loss.backward()
    return draft, outcome


def compare(
    path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """loss_rel and grad_rel of one file; InputError when it is not a file we can reproduce."""
    try:
        arrays = np.load(path, allow_pickle=False)
        meta = json.loads(str(arrays["meta"]))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a parity file: {error}") from None
    if "in/anchors" in arrays.files:
        return compare_blocks(path, device, dtype)
    parallel = "in/anchor_pos" in arrays.files
    speculators = parallel or "step_loss" in arrays.files
    for name in () if speculators else NORMS:
        if meta.get(name) and name not in SPECFORGE_HAS:
            raise InputError(f"{path}: {name} is not what SpecForge trains, so it is not compared")
    draft, outcome = run(arrays, meta, speculators, device, dtype)
    mine = outcome.step_loss_K.double().cpu().numpy()
    reference = arrays["loss" if parallel else "step_loss" if speculators else "ploss"]
    if parallel:
        mine = mine.sum()
    elif speculators:
        mine = mine * meta["decay"] ** np.arange(int(meta["ttt"]))
    loss_rel = largest(abs(mine - reference) / np.maximum(abs(reference), 1e-8))
    return {"loss_rel": loss_rel, "grad_rel": worst_gradient(draft, arrays)}


def worst_gradient(draft: Any, arrays: Any) -> float:
    """The largest difference of a gradient, relative to the largest entry of the peer's."""
    worst = 0.0
    gradients = {name: p.grad for name, p in draft.named_parameters()}
    for key in (k for k in arrays.files if k.startswith("g/")):
        gradient = gradients[ours(key[2:]) if ours(key[2:]) in gradients else key[2:]]
        mine = np.zeros_like(arrays[key]) if gradient is None else gradient.float().cpu().numpy()
        scale = max(float(abs(arrays[key]).max()), 1e-12)
        worst = max(worst, largest(abs(mine - arrays[key]) / scale))
    return worst


def compare_blocks(path: Path, device: str, dtype: torch.dtype) -> dict[str, float]:
    """As `compare`, of blocks at the anchors that the file has."""
    import our_dflash_step  # it imports this module

    arrays = np.load(path, allow_pickle=False)
    meta = json.loads(str(arrays["meta"]))
    if meta["loss"] not in our_dflash_step.TERMS:
        raise InputError(f"{path}: loss {meta['loss']} is not known")
    args = argparse.Namespace(
        file=path, shape=json.dumps(meta["shape"]), loss=meta["loss"], divisor=meta["divisor"],
        device=device, checkpointing=False,
    )  # fmt: skip
    with patch.object(dflash, "make_blocks", dflash.make_blocks):  # it puts the file's there
        draft, outcome, extra = our_dflash_step.prepare(args, dtype)
        found = outcome()
    found.loss.backward()
    reference = float(arrays["loss"])
    loss_rel = largest(abs(float(found.loss.detach()) - extra - reference) / abs(reference))
    return {"loss_rel": loss_rel, "grad_rel": worst_gradient(draft, arrays)}


def largest(differences: Any) -> float:
    """The largest difference; one that is not a number counts as 1e9, so that it never passes."""
    return float(np.nan_to_num(differences, nan=1e9, posinf=1e9).max())


def main() -> int:
    """Compare every file, print a line each and the JSON summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    try:
        for path in args.files:
            results[path.name] = compare(path, args.device, getattr(torch, args.dtype))
            print(path.name, *(f"{k} {v:.2e}" for k, v in results[path.name].items()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ok = all(
        r["loss_rel"] <= LOSS_TOLERANCE and r["grad_rel"] <= GRADIENT_TOLERANCE
        for r in results.values()
    )
    print(json.dumps({"files": results, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
