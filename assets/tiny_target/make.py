"""Train the tiny chat model that stands in for a large target, and write it beside this file.

    python assets/tiny_target/make.py [--out DIR] [--steps N] [--seed N]

A byte-level BPE tokenizer and a Qwen3 of about 1.1 million parameters are trained from scratch, on
one thread, on the train split of `specforge_exp.data.synthetic` rendered as ChatML.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from specforge_exp.data import synthetic  # noqa: E402  (run as a script, the root is not on the path)

VOCAB_SIZE = 1024
PAD, BOT, EOT = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful assistant."
SYSTEM_SHARE = 0.25
TRAIN_COUNT, EVAL_COUNT, BENCH_COUNT = 20000, 100, 50
ROWS, LENGTH = 4, 384
PEAK_RATE, WEIGHT_DECAY, WARMUP = 4e-3, 0.05, 60
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(conversations: list[dict]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCAB_SIZE` entries on the message texts and role headers."""

    def texts() -> Iterator[str]:
        yield SYSTEM
        for conversation in conversations:
            for message in conversation["conversations"]:
                yield f"{message['role']}\n"
                yield message["content"]

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOT, EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOT,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A freshly initialised Qwen3 with eight layers of width 128, in float32."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[dict], seed: int
) -> list[list[int]]:
    """Token ids of each rendered conversation, some of them with a system message in front."""
    rng = random.Random(seed)
    documents = []
    for conversation in conversations:
        messages = conversation["conversations"]
        if rng.random() < SYSTEM_SHARE:
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        documents.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return documents


def batches(documents: list[list[int]], seed: int) -> Iterator[torch.Tensor]:
    """Endless [ROWS, LENGTH] batches of whole documents in a row, reshuffled every epoch.

    Each row begins with a document, as a prompt does in use; one cut off at the end of a row
    begins the next row again, so that no ending goes unseen and nothing is padded.
    """
    rng = random.Random(seed)
    rows: list[list[int]] = []
    row: list[int] = []
    while True:
        for document in rng.sample(documents, len(documents)):
            if len(row) + len(document) > LENGTH:
                rows.append((row + document)[:LENGTH])
                row = []
            row = row + document
            if len(rows) == ROWS:
                yield torch.tensor(rows)
                rows = []


def answer_mask(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """True at the answer tokens, the closing mark included, of one document's ids [length]."""
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    inside = False
    for position, token in enumerate(ids.tolist()):
        mask[position] = inside
        if token == tokenizer.eos_token_id:
            inside = False
        elif ids[max(0, position + 1 - len(header)) : position + 1].tolist() == header:
            inside = True
    return mask


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: list[list[int]]
) -> tuple[float, float]:
    """Mean negative log-likelihood in nats per token: over all tokens, and over answers only."""
    model.eval()
    every, answers = [], []
    for document in documents:
        ids = torch.tensor(document)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        every.append(losses)
        answers.append(losses[answer_mask(ids, tokenizer)[1:]])
    model.train()
    return torch.cat(every).mean().item(), torch.cat(answers).mean().item()


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, list[list[int]]],
    steps: int,
    seed: int,
) -> float:
    """Train in place on every token and return the held-out answer loss in nats per token."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / WARMUP)
            * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        ),
    )
    started = time.perf_counter()
    for step, ids in zip(range(1, steps + 1), batches(data["train"], seed), strict=False):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == steps:
            every, answers = evaluate(
                model, tokenizer, data["eval"][: 30 if step < steps else None]
            )
            seconds = time.perf_counter() - started
            print(
                f"step {step}/{steps}  train {loss.item():.3f}  val {every:.3f}  "
                f"val answers {answers:.3f}  {seconds:.0f} s",
                flush=True,
            )
    return answers


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write bfloat16 weights, configurations, tokenizer and chat template into `out`."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    # The name that releases before transformers 5 know as well.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


@torch.no_grad()
def report(out: Path) -> float:
    """Load what was written, answer held-out prompts greedily; the share that end by themselves."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    ended = 0
    for index, conversation in enumerate(synthetic.generate("bench", BENCH_COUNT)):
        prompt = tokenizer.apply_chat_template(
            conversation["conversations"][:1],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**prompt, max_new_tokens=256, do_sample=False)[0]
        ended += int(output[-1] == tokenizer.eos_token_id)
        if index < 3:
            print(f"--- sample {index}\n{tokenizer.decode(output)}")
    return ended / BENCH_COUNT


def main() -> None:
    """Train, save, reload and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="directory to write into")
    parser.add_argument("--steps", type=int, default=2300, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    conversations = synthetic.generate("train", TRAIN_COUNT, options.seed)
    tokenizer = train_tokenizer(conversations)
    held_out = synthetic.generate("eval", EVAL_COUNT, options.seed)
    data = {
        "train": encode(tokenizer, conversations, options.seed),
        "eval": encode(tokenizer, held_out, options.seed),
    }
    model = build_model(tokenizer)
    tokens = sum(map(len, data["train"]))
    print(f"{model.num_parameters()} parameters, {tokens} training tokens, vocab {len(tokenizer)}")
    answers = train(model, tokenizer, data, options.steps, options.seed)
    save(model, tokenizer, options.out)
    share = report(options.out)
    size = sum(path.stat().st_size for path in options.out.iterdir() if path.is_file())
    summary = {
        "answer_loss": round(answers, 3),
        "share_ended": share,
        "bytes": size,
        "seconds": round(time.perf_counter() - started),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
