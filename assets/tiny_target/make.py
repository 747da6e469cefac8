"""Make the tiny chat model that stands in for a large target, and write it beside this file.

    python assets/tiny_target/make.py [--out DIR] [--work DIR] [--steps PRETRAIN SFT]

A byte-level BPE tokenizer and the configuration of a Qwen3 of about 1.1 million weights come from
the train split of `specforge_exp.data.synthetic`, rendered as ChatML. The weights come from two
trainings on one thread, whose commands are printed: pretrain.py reads the conversations as text,
sft.py goes on with their answers.
"""

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from specforge_exp.data import synthetic  # noqa: E402  (run as a script, the root is not on the path)

VOCAB_SIZE = 1024
PAD, BOT, EOT = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful assistant."
SYSTEM_SHARE = 0.25
READ_COUNT, TUNED_COUNT, EVAL_COUNT, BENCH_COUNT = 20000, 3000, 100, 50
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BOTH = [
    "trainer.warmup_ratio=0.03", "trainer.min_lr_ratio=0.02", "trainer.weight_decay=0.05",
    "causal.beta2=0.98", "trainer.eval_every=200", "trainer.save_every=200",
]  # fmt: skip
# A step is a row of about eight conversations, of which the last one is cut off. sft goes on with
# the weights as they are.
PRETRAIN = [
    "max_length=1536", "trainer.batch_size=1", f"pretrain.eval_documents={EVAL_COUNT}",
    "export.dtype=float32",
]  # fmt: skip
SFT = [
    "model.init=weights", "lr=1e-3", "export.dtype=bfloat16",
    f"data.train=[{{path: 'synthetic:train', limit: {TUNED_COUNT}}}]",
    f"data.eval=[{{path: 'synthetic:eval', limit: {EVAL_COUNT}}}]",
]  # fmt: skip


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


def write_start(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Everything but weights: eight layers of width 128, tokenizer and chat template."""
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
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
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    # The name that releases before transformers 5 know as well.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def write_text(file: Path, conversations: list[dict]) -> None:
    """Rendered conversations, some of them with a system message in front, a document each."""
    rng = random.Random(0)
    with file.open("w") as lines:
        for conversation in conversations:
            messages = conversation["conversations"]
            if rng.random() < SYSTEM_SHARE:
                messages = [{"role": "system", "content": SYSTEM}, *messages]
            turns = (f"{BOT}{m['role']}\n{m['content']}{EOT}" for m in messages)
            lines.write(json.dumps({"text": "\n".join(turns)}) + "\n")


def call(words: list[str]) -> None:
    """Run one of the project's scripts."""
    subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=ROOT, check=True)


def make(out: Path, work: Path, steps: tuple[int, int], run: Callable[[list[str]], None]) -> None:
    """Make the model below `work` and copy it to `out`.

    Args:
        out: the folder of the finished model.
        work: where corpus and checkpoints go.
        steps: of either training.
        run: runs a script of the project, given its name and options.
    """
    start, text, runs = work / "start", work / "text.jsonl", work / "checkpoints"
    start.mkdir(parents=True, exist_ok=True)
    conversations = synthetic.generate("train", READ_COUNT, 0)
    write_start(start, train_tokenizer(conversations))
    write_text(text, conversations)
    places = [f"paths.datasets={work / 'datasets'}", f"paths.checkpoints={runs}"]
    read = [
        "experiment=pretrain_tiny", f"model.path={start}", "run_name=read", *BOTH, *PRETRAIN,
        f"pretrain.sources=[{{path: '{text}'}}]", f"max_steps={steps[0]}", *places,
    ]  # fmt: skip
    tuned = [
        "experiment=sft_tiny", f"model.path={runs / 'read' / 'export'}", "run_name=tuned", *BOTH,
        *SFT, f"max_steps={steps[1]}", *places,
    ]  # fmt: skip
    for words in (
        ["pretrain.py", *read], ["prep.py", *tuned], ["preprocess.py", *tuned], ["sft.py", *tuned],
    ):  # fmt: skip
        print(shlex.join(["python", *words]), flush=True)
        run(words)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(runs / "tuned" / "export" / "model.safetensors", out / "model.safetensors")
    for file in start.iterdir():
        shutil.copyfile(file, out / file.name)


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
    """Make, reload and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="directory to write into")
    parser.add_argument("--work", type=Path, help="keep corpus and checkpoints here")
    parser.add_argument("--steps", type=int, nargs=2, default=(2000, 300), metavar="N")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).resolve()
        make(options.out, work, tuple(options.steps), call)
    torch.set_num_threads(1)
    summary = {
        "share_ended": report(options.out),
        "bytes": sum(path.stat().st_size for path in options.out.iterdir() if path.is_file()),
        "seconds": round(time.perf_counter() - started),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
