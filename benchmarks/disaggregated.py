"""The target in the trainer's process, from a disk cache, and in a worker whose states cross by
Ray's store or by Mooncake's: what each costs.

    python benchmarks/disaggregated.py [--json] [--model tiny|smollm2|FOLDER] [--steps 60]

One trainer and one worker train EAGLE-3 on the same conversations with the same order, one run
after the other; the losses must be equal to the bit. `tiny` is the target that comes with the
repository; `smollm2` has the shape of SmolLM2-135M with random numbers, which cost the same; a
folder is a model of its own. Reported are CPU seconds of the trainer from the end of the first step
to the end of the training, the held-out round there included, of the worker and of Ray's and
Mooncake's own processes from when the worker is ready, wall seconds of the whole command, and the
most bytes of states held. `overhead` compares like with like: for the conversations that the
trainer's seconds hold, those of the held-out round among them, what trainer, worker and Mooncake's
processes take together beyond the trainer that has the target itself, as a share of the worker's
own. Of a worker's seconds those are the conversations' share. Ray's own processes stand beside it:
what they take goes with the wall's seconds. Runs beside other work do not compare, as CPU seconds
rise with the load. Without Mooncake its line is left out. The last line is JSON.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
NAMES = {
    "inprocess": [],
    "disk": ["target.cache=disk"],
    "ray": ["target.placement=ray", "target.buffer_gb=0.2"],
    "mooncake": ["target.placement=ray", "target.buffer_gb=0.2", "target.store=mooncake"],
}
TICKS = os.sysconf("SC_CLK_TCK")
KINDS = ("launcher", "trainer", "worker", "ray", "store")
BATCH = 8
HELD_OUT = 8
"""Conversations, evaluated once, at the end."""


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


def kind_of(pid: int) -> str:
    """What a process is, by its command line; "" when it has gone."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
    if line.startswith("ray::TargetWorker"):
        return "worker"
    if "spawn_main" in line or "multiprocessing.forkserver" in line:
        return "trainer"
    if "mooncake_master" in line or "inference.holder" in line:
        return "store"
    return "launcher" if "train.py" in line else "ray" if line else ""


def used(pid: int) -> dict[str, float]:
    """CPU seconds of a process and all below it, by kind."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        number = int(stat.parent.name)
        parents[number], ticks[number] = int(fields[1]), int(fields[11]) + int(fields[12])
    family, seconds = [pid], dict.fromkeys(KINDS, 0.0)
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
        if kind := kind_of(member):
            seconds[kind] += ticks.get(member, 0) / TICKS
    return seconds


def train(words: list[str], metrics: Path) -> dict[str, Any]:
    """Run one training, and look at its processes until the last step."""
    began = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), *words],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout
    reader = threading.Thread(target=lines.extend, args=(process.stdout,))
    reader.start()
    ready: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while process.poll() is None:
        now = used(process.pid)
        if not ready and any("workers are ready" in line for line in lines):
            ready = now
        if not first and metrics.exists() and metrics.stat().st_size:
            first = now
        if first and sum(now.values()) >= sum(last.values()):
            last = now
        time.sleep(0.1)
    reader.join()
    if process.returncode:
        sys.exit("".join(lines))
    apart = first["trainer"] > 0
    trainer = "trainer" if apart else "launcher"
    account = re.findall(r"(\d+) taken, .* at most (\S+) MB held", "".join(lines))
    return {
        "trainer_cpu_s": round(last[trainer] - first[trainer], 2),
        "worker_cpu_s": round(last["worker"] - ready["worker"], 2) if apart else 0.0,
        "ray_cpu_s": round(last["ray"] - ready["ray"], 2) if apart else 0.0,
        "store_cpu_s": round(last["store"] - ready["store"], 2) if apart else 0.0,
        "wall_s": round(time.monotonic() - began, 1),
        "peak_held_mb": float(account[0][1]) if account else 0.0,
        "worker_conversations": int(account[0][0]) if account else 0,
    }


def measure(folder: Path, model: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """All ways to train, by name."""
    results: dict[str, dict[str, Any]] = {}
    for name, options in NAMES.items():
        if name == "mooncake" and find_spec(name) is None:
            continue
        run = folder / "checkpoints" / name
        words = [
            "experiment=quickstart", *model, "loss=baseline", "target.cache=none",
            f"paths.datasets={folder / 'datasets'}", f"paths.checkpoints={run.parent}",
            f"run_name={name}", f"max_steps={steps}", "epochs=9", f"trainer.batch_size={BATCH}",
            "trainer.log_every=1", "trainer.eval_every=9999", *options,
        ]  # fmt: skip
        results[name] = train(words, run / "metrics.jsonl")
        results[name]["losses"] = losses(run)
    return results


def losses(run: Path) -> list[float]:
    """Every loss of a training."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def overhead(own: dict[str, Any], away: dict[str, Any], steps: int) -> float:
    """What a split costs, as a share of the worker's CPU. The trainer's seconds hold the
    conversations of all steps but the first, and those of the held-out round."""
    share = ((steps - 1) * BATCH + HELD_OUT) / away["worker_conversations"]
    worker: float = share * away["worker_cpu_s"]
    both: float = away["trainer_cpu_s"] + worker + share * away["store_cpu_s"]
    beyond: float = both - own["trainer_cpu_s"]
    return round(beyond / worker, 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2 or a folder")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = ["preprocess.source=prep", "data.name=bench"]
        for split, number in (("train", BATCH * args.steps), ("eval", HELD_OUT)):
            model.append(f"data.{split}=[{{path: 'synthetic:{split}', limit: {number}}}]")
        if args.model != "tiny":
            path = smollm2(folder) if args.model == "smollm2" else Path(args.model).resolve()
            model += ["model=local", f"model.path={path}", "model.name=other"]
        for stage in ("prep", "preprocess"):
            words = ["experiment=quickstart", *model, f"paths.datasets={folder / 'datasets'}"]
            subprocess.run(
                [sys.executable, str(HERE / f"{stage}.py"), *words],
                cwd=HERE, check=True, capture_output=True,
            )  # fmt: skip
        results = measure(folder, model, args.steps)
    equal = len({tuple(result.pop("losses")) for result in results.values()}) == 1
    for name in ("ray", "mooncake"):
        if away := results.get(name):
            away["overhead"] = overhead(results["inprocess"], away, args.steps)
    if not args.json:
        for kind, result in results.items():
            print(kind, *(f"{name} {value}" for name, value in result.items()), sep="  ")
    load = os.getloadavg()[0]
    print(json.dumps({"model": args.model, "load": load, "runs": results, "equal": equal}))


if __name__ == "__main__":
    main()
