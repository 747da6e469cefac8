"""One training step of sft's objective, timed: what benchmarks/sft_step.py runs.

python benchmarks/our_sft_step.py FOLDER --threads 2 --steps 3
"""

import json
from pathlib import Path
from typing import Any

import torch
from peers.measure import arguments, measure

from specforge_exp.causal.model import Causal
from specforge_exp.causal.objective import causal_lm
from specforge_exp.causal.training import load_causal
from specforge_exp.config import Config, ModelConfig
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Objective
from specforge_exp.training.ranks import Ranks

CPU = torch.device("cpu")


def prepare(folder: Path, chats: list[dict[str, list[int]]]) -> tuple[Causal, Objective, Batch]:
    """The model as sft loads it, its objective, and the conversations packed."""
    cfg = Config(run_name="peer", model=ModelConfig(name="peer", path=str(folder / "model")))
    causal = load_causal(cfg, CPU, Ranks())
    causal.requires_grad_(True)
    ids_T, turns_T = (
        torch.tensor([number for chat in chats for number in chat[key]]) for key in ("ids", "mask")
    )
    lengths = [len(chat["ids"]) for chat in chats]
    batch = Batch(ids_T, turns_T, list(range(len(chats))), lengths, 0)
    return causal, causal_lm(causal, CPU), batch


def main() -> None:
    """Print the medians as JSON."""
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    chats = json.loads((args.file / "chats.json").read_text())
    causal, objective, batch = prepare(args.file, chats)
    count = objective.denominators(batch)
    losses: list[float] = []

    def step() -> None:
        causal.zero_grad(set_to_none=False)
        outcome = objective.forward(batch, count)
        outcome.loss.backward()
        losses.append(float(outcome.loss.detach()))

    found: dict[str, Any] = {"who": "ours", **measure(step, args), "loss": losses[0]}
    print(json.dumps({**found, "rows": int(count[0]), "tokens": len(batch.ids_T)}))


if __name__ == "__main__":
    main()
