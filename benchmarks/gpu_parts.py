"""The parts of gpu_check.py that no other benchmark has; each prints JSON as its last line."""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.measure import matmul_rate

from specforge_exp.drafts.kernels.check import unusable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TINY = ROOT / "assets" / "tiny_target"


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What this is, and the rate of a plain product."""
    result: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda
    }  # fmt: skip
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {"gpu": properties.name, "memory_gb": properties.total_memory / 2**30}
        result["bf16_tflops"] = matmul_rate("cuda", torch.bfloat16) / 1e12
        result["kernels"] = unusable(torch.device("cuda"), (8, 4, 128)) or "right"
    return result


def tests(args: argparse.Namespace) -> dict[str, Any]:
    """The tests marked gpu."""
    files = [
        str(path)
        for path in sorted((ROOT / "tests" / "specforge_exp").glob("test_*.py"))
        if "mark.gpu" in path.read_text()  # the others need packages that a bare machine lacks
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if args.rehearse:
        command.append("--collect-only")
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    return {"good": done.returncode == 0, "end": (done.stdout + done.stderr)[-1500:]}


def random_target(folder: Path, toy: bool) -> Path:
    """A Qwen3 of 0.6B's shape (toy: of a test's) with random weights and the tiny tokenizer."""
    from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

    tiny = AutoConfig.from_pretrained(TINY)
    sizes: dict[str, Any] = {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    }  # fmt: skip
    if toy:
        sizes = {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4096,
        }  # fmt: skip
    sizes["vocab_size"] = max(sizes["vocab_size"], tiny.vocab_size)
    torch.manual_seed(0)
    config = Qwen3Config(
        **sizes, tie_word_embeddings=True, max_position_embeddings=4096,
        eos_token_id=tiny.eos_token_id, bos_token_id=tiny.bos_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    path = folder / "target"
    model.save_pretrained(path)
    for file in [*TINY.glob("tokenizer*"), TINY / "chat_template.jinja"]:
        shutil.copy(file, path)
    return path


def seconds_of(run: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median of some calls, the first left out."""
    times = []
    for _ in range(3 if args.rehearse else 20):
        if args.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def target(args: argparse.Namespace) -> dict[str, Any]:
    """The target's forward over 2048 tokens: seconds, and FLOP beside a plain product's; and over
    as many of eight conversations, one by one and together (target.pack_tokens)."""
    from specforge_exp.config import ModelConfig
    from specforge_exp.target import load_target

    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        path = random_target(Path(folder), args.rehearse)
        loaded = load_target(ModelConfig(name="random", path=str(path)), device, feeds=None)
    count = sum(weight.numel() for name, weight in loaded.model.named_parameters()
                if "embed" not in name and "lm_head" not in name)  # fmt: skip
    tokens = 64 if args.rehearse else 2048
    ids = torch.randint(0, 512, (1, tokens), device=device)
    seconds = seconds_of(lambda: loaded.features(ids), args)
    texts = list(ids[0].split(tokens // 8))
    alone = seconds_of(lambda: loaded.states(texts), args)
    loaded.take_packing()
    together = seconds_of(lambda: loaded.states(texts, tokens), args)
    rate = matmul_rate(args.device, loaded.model.dtype)
    return {
        "tokens": tokens, "forward_s": seconds, "mfu": 2 * count * tokens / seconds / rate,
        "eight_alone_s": alone, "eight_together_s": together,
        "attention": loaded.text._attn_implementation,
    }  # fmt: skip


def train_command(args: argparse.Namespace, name: str, *more: str) -> list[str]:
    """train.py on the random target."""
    length, pack = (256, 512) if args.rehearse else (2048, 8192)
    return [
        sys.executable, str(ROOT / "train.py"), *shared(args), f"run_name={name}",
        f"trainer.pack_tokens={pack}", f"max_length={length}", "trainer.batch_size=8",
        "trainer.gpus=1", "trainer.log_every=1", "trainer.eval_every=1000", *more,
    ]  # fmt: skip


def shared(args: argparse.Namespace) -> list[str]:
    """What all stages here have in common."""
    return [
        "model=local", "model.name=random", f"model.path={args.folder / 'target'}",
        "data=synthetic", "data.name=gpu", "loss=full-opd", "lr=1e-4", f"device={args.device}",
        f"data.train=[{{path: 'synthetic:train', limit: {16 if args.rehearse else 400}}}]",
        "draft.draft_vocab_size=512", "preprocess.source=prep",
        f"threads={1 if args.rehearse else 'null'}",  # toy operations are too small to share
        f"paths.datasets={args.folder / 'datasets'}",
        f"paths.checkpoints={args.folder / 'checkpoints'}",
    ]  # fmt: skip


def tokens(args: argparse.Namespace) -> None:
    """The target and its tokens, made once."""
    if not (args.folder / "target").exists():
        random_target(args.folder, args.rehearse)
    length = 256 if args.rehearse else 2048
    for stage in ("prep", "preprocess"):
        command = [sys.executable, str(ROOT / f"{stage}.py"), *shared(args), f"max_length={length}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def metrics(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl that have a loss."""
    path = args.folder / "checkpoints" / name / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if "loss" in line]


def training(args: argparse.Namespace) -> dict[str, Any]:
    """train.py itself, with the target inline: tokens per second, MFU, memory, loss."""
    tokens(args)
    steps = 4 if args.rehearse else 30
    command = train_command(args, "speed", f"max_steps={steps}")
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = metrics(args, "speed")
    later = lines[len(lines) // 3 :]
    keys = ("tokens_per_s", "mfu", "data_wait", "peak_memory_mb")
    medians = {key: statistics.median(line[key] for line in later) for key in keys}
    return {**medians, "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"]}


def resume(args: argparse.Namespace) -> dict[str, Any]:
    """Killed at a step and continued, beside a run that nothing disturbed."""
    tokens(args)
    options = ["max_steps=16", "trainer.save_every=2"]
    whole, killed = (train_command(args, name, *options) for name in ("whole", "killed"))
    subprocess.run(whole, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(killed, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(metrics(args, "killed")) < 5:
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    was_killed = process.wait() == -signal.SIGKILL  # else nothing was resumed
    subprocess.run(killed, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    pairs = [
        (one["loss"], other["loss"])
        for one, other in zip(metrics(args, "whole"), metrics(args, "killed"), strict=True)
    ]
    difference = max(abs(one - other) / abs(one) for one, other in pairs)
    good = was_killed and difference == 0.0
    return {"steps": len(pairs), "good": good, "killed": was_killed, "difference": difference}


def main() -> None:
    """Run one part."""
    known = {part.__name__: part for part in (machine, tests, target, training, resume)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=known)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    result = known[args.part](args)
    print(json.dumps(result))
    sys.exit(not result.get("good", True))


if __name__ == "__main__":
    main()
