"""One training step of TRL's SFTTrainer or of transformers' Trainer: what sft_step.py runs.

    python -m peers.sft_step FOLDER --who trl|trl_packed|transformers --steps 3 [--record FILE]

Their own collators make the batch and their own `training_step` makes loss and gradients; nothing
is patched. `trl` pads the conversations, as its default does, `trl_packed` packs them (best fit
decreasing) into one row without padding, `transformers` is the plain Trainer with a padded batch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from .measure import arguments, measure

TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny_target"
"""Only its padding is used: the conversations are tokens already."""
IGNORED = -100


def make_trainer(who: str, folder: Path, chats: list[dict[str, list[int]]]) -> Trainer:
    """The trainer that a user would make, on a CPU in fp32, without recomputation."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    options: dict[str, Any] = {
        "output_dir": str(folder / who), "use_cpu": True, "bf16": False, "report_to": [],
        "gradient_checkpointing": False, "per_device_train_batch_size": len(chats),
    }  # fmt: skip
    if who == "transformers":
        rows = [{"input_ids": chat["ids"], "labels": labels(chat)} for chat in chats]
        return Trainer(
            model,
            TrainingArguments(**options),
            DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            Dataset.from_list(rows),
        )
    from trl import SFTConfig, SFTTrainer

    longest = max(len(chat["ids"]) for chat in chats)
    rows = [{"input_ids": chat["ids"], "assistant_masks": chat["mask"]} for chat in chats]
    settings = SFTConfig(**options, max_length=longest, packing=who == "trl_packed")
    return SFTTrainer(
        model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def labels(chat: dict[str, list[int]]) -> list[int]:
    """The assistant's tokens."""
    pairs = zip(chat["ids"], chat["mask"], strict=True)
    return [token if spoken else IGNORED for token, spoken in pairs]


def record(file: Path, trainer: Trainer, chats: list[Any], loss: float) -> None:
    """What a test needs to be compared: conversations, weights, loss and gradients."""
    model: Any = trainer.model
    arrays = {f"w/{name}": weight.numpy() for name, weight in model.state_dict().items()}
    arrays |= {f"g/{name}": p.grad.numpy() for name, p in model.named_parameters()}
    meta = {"config": model.config.to_dict(), "chats": chats, "loss": loss}
    np.savez_compressed(file, meta=json.dumps(meta), **arrays)


def main() -> None:
    """Print the medians as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--who", choices=["trl", "trl_packed", "transformers"], required=True)
    parser.add_argument("--record", type=Path, help="write a step's arrays instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chats = json.loads((args.file / "chats.json").read_text())
    trainer = make_trainer(args.who, args.file, chats)
    [inputs] = list(trainer.get_train_dataloader())
    count = (inputs["labels"] != IGNORED).sum()
    model: Any = trainer.model

    def step() -> float:
        model.zero_grad(set_to_none=False)
        return float(trainer.training_step(model, dict(inputs), count))

    loss = step()
    if args.record:
        record(args.record, trainer, chats, loss)
        return
    found = measure(step, args)
    places = inputs["input_ids"].numel()
    print(
        json.dumps({"who": args.who, **found, "loss": loss, "rows": int(count), "tokens": places})
    )


if __name__ == "__main__":
    main()
