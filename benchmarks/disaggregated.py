"""The target in the trainer's process, from a disk cache, and in a Ray worker: what each costs.

    python benchmarks/disaggregated.py [--json] [--model tiny|smollm2] [--steps 12]

One trainer and one worker train EAGLE-3 on the same conversations with the same order, one run
after the other; the losses must be equal to the bit. `tiny` is the target that comes with the
repository; `smollm2` has the shape of SmolLM2-135M with random numbers, which cost the same.
Reported are CPU seconds of the trainer and of the worker (their start and the loading of the target
left out: the longer of two runs less the shorter), of Ray's own processes, wall seconds, and the
most bytes of states held. `store` is what one conversation costs in trainer, worker and Ray beyond
the same run with the target in its process, as a share of the target's own CPU. The last line is
JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
NAMES = {
    "inprocess": [],
    "disk": ["target.cache=disk"],
    "ray": ["target.placement=ray", "target.buffer_gb=0.2"],
}
TICKS = os.sysconf("SC_CLK_TCK")
SHORT = 2
"""Steps of the shorter run."""


@dataclass
class Run:
    """What one training took."""

    wall: float
    text: str
    cpu: dict[str, float] = field(default_factory=dict)
    """Seconds by kind of process: trainer, worker, ray."""


def smollm2(folder: Path) -> Path:
    """A target of SmolLM2-135M's shape with random numbers and the tiny target's tokenizer."""
    import shutil

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tiny = HERE / "assets" / "tiny_target"
    path = folder / "smollm2"
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tiny)), hidden_size=576,
        intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    for file in tiny.iterdir():
        if (
            file.is_file()
            and not (path / file.name).exists()
            and file.suffix in (".json", ".jinja")
        ):
            shutil.copy(file, path / file.name)
    return path


def kind_of(pid: int) -> str | None:
    """What a process is, by its command line; None when it has gone."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return None
    if line.startswith("ray::Worker"):
        return "worker"
    if "spawn_main" in line or "train.py" in line:
        return "trainer"
    return "ray"


def children(parents: dict[int, int], pid: int) -> list[int]:
    """A process and all below it."""
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def watch(pid: int, cpu: dict[int, tuple[str, float]], ended: threading.Event) -> None:
    """Note the CPU seconds of a process and all below it until it has ended."""
    while not ended.wait(0.2):
        parents, used = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            number = int(stat.parent.name)
            parents[number], used[number] = int(fields[1]), int(fields[11]) + int(fields[12])
        for member in children(parents, pid):
            kind = cpu.get(member, (None, 0))[0] or kind_of(member)
            if kind in ("ray", "trainer"):  # a worker is one only once it has its name
                kind = kind_of(member) or kind
            if kind:
                cpu[member] = kind, used.get(member, 0) / TICKS


def train(words: list[str]) -> Run:
    """Run one training, watched."""
    began, cpu, ended = time.monotonic(), {}, threading.Event()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), *words],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    watcher = threading.Thread(target=watch, args=(process.pid, cpu, ended))
    watcher.start()
    text, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        sys.exit(text)
    run = Run(time.monotonic() - began, text)
    for kind, seconds in cpu.values():
        run.cpu[kind] = run.cpu.get(kind, 0.0) + seconds
    return run


def measure(folder: Path, model: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """All ways to train, by name."""
    results: dict[str, dict[str, Any]] = {}
    for name, options in NAMES.items():
        runs = {}
        for length in (SHORT, steps):
            words = [
                "experiment=quickstart", *model, "loss=baseline", "target.cache=none",
                "preprocess.source=prep", f"paths.datasets={folder / 'datasets'}",
                f"paths.checkpoints={folder / 'checkpoints'}", f"run_name={name}-{length}",
                f"max_steps={length}", "epochs=9", "trainer.batch_size=8", "trainer.log_every=1",
                "trainer.eval_every=9999", "bench=default", *options,
            ]  # fmt: skip
            runs[length] = train([word for word in words if word])
        long, short = runs[steps], runs[SHORT]
        held = re.findall(r"at most (\S+) MB held", long.text)
        used = {
            kind: round(long.cpu.get(kind, 0.0) - short.cpu.get(kind, 0.0), 2)
            for kind in ("trainer", "worker", "ray")
        }
        results[name] = {
            "trainer_cpu_s": used["trainer"],
            "worker_cpu_s": used["worker"],
            "ray_cpu_s": used["ray"],
            "wall_s": round(long.wall, 1),
            "peak_held_mb": float(held[-1]) if held else 0.0,
            "losses": losses(folder / "checkpoints" / f"{name}-{steps}"),
        }
    return results


def losses(run: Path) -> list[float]:
    """Every loss of a training."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model: list[str] = []
        if args.model == "smollm2":
            model = ["model=local", f"model.path={smollm2(folder)}", "model.name=smollm2"]
        for stage in ("prep", "preprocess"):
            words = [
                "experiment=quickstart", *model, "preprocess.source=prep",
                f"paths.datasets={folder / 'datasets'}",
            ]  # fmt: skip
            subprocess.run(
                [sys.executable, str(HERE / f"{stage}.py"), *words],
                cwd=HERE, check=True, capture_output=True,
            )  # fmt: skip
        results = measure(folder, model, args.steps)
    equal = len({tuple(result.pop("losses")) for result in results.values()}) == 1
    if not args.json:
        conversations = 8 * (args.steps - SHORT)
        for kind, result in results.items():
            per = {k: 1000 * v / conversations for k, v in result.items() if k.endswith("cpu_s")}
            line = ", ".join(f"{k.removesuffix('_cpu_s')} {v:.1f} ms" for k, v in per.items())
            print(f"{kind:10} CPU of a conversation: {line}; {result['wall_s']} s in all")
    print(json.dumps({"model": args.model, "load": os.getloadavg()[0], "runs": results,
                      "equal": equal}))  # fmt: skip


if __name__ == "__main__":
    main()
