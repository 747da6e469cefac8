"""One step of sft: ours beside TRL's SFTTrainer and transformers' Trainer, on a CPU.

    python benchmarks/sft_step.py [--json] [--steps 3] [--threads 2] [--cases chats equal]
    python benchmarks/sft_step.py --record FILE.npz     # a step of TRL's on a tiny model, as arrays

Everybody gets the same weights (SmolLM2-135M's shape) and conversations, half of each a prompt, in
fp32, in a process of its own, one after the other. Measured are loss and backward, without
the optimiser, as benchmarks/train_step.py does.

    chats    conversations of 64, 128, .. 512 tokens
    equal    four of 512: there is nothing to pad

Both ratios are to the better peer, which may be one for time and the other for memory; TRL takes
part padded (its default) and packed (`packing=True`). `loss_rel` is the largest relative difference
of a peer's loss to ours. The peers run in a virtual environment that the first run makes.
"""

import argparse
import json
import os
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from train_step import HERE, peers_python, run
from transformers import AutoModelForCausalLM, LlamaConfig

CASES = {"chats": list(range(64, 513, 64)), "equal": [512] * 4}
PEERS = ("trl", "trl_packed", "transformers")
INSTALLS = [["torch==2.13.0"], ["transformers==5.8.1", "trl==1.16.0"]]
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def write_inputs(folder: Path, shape: dict[str, Any], lengths: list[int]) -> None:
    """A model with random weights, and conversations of random tokens whose first half is asked."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=8192, rope_theta=1e5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    draw = random.Random(1)
    chats = [
        {
            "ids": [draw.randrange(3, shape["vocab_size"]) for _ in range(length)],
            "mask": [int(place >= length // 2) for place in range(length)],
        }
        for length in lengths
    ]
    (folder / "chats.json").write_text(json.dumps(chats))


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cases: prints the table and returns the summary."""
    print(f"{'case':8} {'who':13} {'rows':>5} {'tokens':>6} {'loss':>9} {'CPU s':>7} {'MB':>7}")
    summary: dict[str, Any] = {"cases": {}, "runs": []}
    for case in args.cases:
        write_inputs(folder, SMOLLM2, CASES[case])
        steps = [*(("peers.sft_step", "--who", who) for who in PEERS), ("our_sft_step",)]
        # One process at a time (args.apart): full logits of a peer are up to 9 GB.
        *peers, ours = run(folder, args, *steps)
        for one in (*peers, ours):
            print(
                f"{case:8} {one['who']:13} {one['rows']:5} {one['tokens']:6} {one['loss']:9.5f} "
                f"{one['cpu_s']:7.2f} {one['activation_mb']:7.0f}",
                flush=True,
            )
            summary["runs"].append({"case": case, **one})
        summary["cases"][case] = ratios(ours, peers)
    return summary


def ratios(ours: dict[str, Any], peers: list[dict[str, Any]]) -> dict[str, float]:
    """Of our step to the better peer's, and the largest difference of a loss."""
    cpu, memory = (min(peer[key] for peer in peers) for key in ("cpu_s", "activation_mb"))
    return {
        "cpu_ratio": ours["cpu_s"] / cpu,
        "activation_ratio": ours["activation_mb"] / memory,
        "loss_rel": max(abs(peer["loss"] / ours["loss"] - 1) for peer in peers),
    }


def record(args: argparse.Namespace, folder: Path) -> None:
    """What tests/specforge_exp/test_causal.py compares with: TRL's packed step."""
    write_inputs(folder, TINY, [24, 7, 40, 13, 33])
    words = [args.peers_python, "-m", "peers.sft_step", folder, "--who", "trl_packed"]
    subprocess.run([*map(str, words), "--record", str(args.record.resolve())], cwd=HERE, check=True)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """What was asked for; with what `train_step.run` wants to know besides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the summary as the last line")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, help="write TRL's step as arrays, measure nothing")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--venv", type=Path, default=cache / "specforge_exp" / "trl")
    parser.add_argument("--peers-python", type=Path, help="an interpreter that has the peers")
    parser.set_defaults(device="cpu", shape={}, apart=True, instructions=False)
    return parser.parse_args(words)


def main() -> None:
    """Parse, measure, print."""
    args = parsed()
    args.peers_python = args.peers_python or peers_python(args.venv, INSTALLS)
    with tempfile.TemporaryDirectory() as folder:
        if args.record:
            record(args, Path(folder))
            return
        summary = compare(args, Path(folder))
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
