"""Everything that is to be known of a GPU, in minutes: `bash runs/gpu_check.sh`.

    python benchmarks/gpu_check.py [--out gpu_check.json] [--seconds 520] [--rehearse] [--only NAME]

Each part is a command of its own with a limit of time; the JSON is written anew after each, so what
was measured stays when the machine goes. Parts, the most telling first: the machine, tests marked
gpu, parity with the peers' recorded losses in fp32 and bf16, one training step (EAGLE-3, DFlash;
Qwen3-0.6B's and Qwen3-8B's shapes, 2048 tokens) with launches, synchronisations and the ten
largest kernels, the target's forward, training from end to end, resume to the bit. Peers take part
in the steps where `--peers-python` has them; no network is used.

`--rehearse` does the same on a CPU with small shapes: it shows that the commands run, no more.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SMALL = {"hidden": 1024, "inter": 3072, "heads": 16, "kv-heads": 8}
LARGE = {"hidden": 4096, "inter": 12288, "heads": 32, "kv-heads": 8}
TOY = {"hidden": 64, "inter": 96, "heads": 4, "kv-heads": 2, "head-dim": 16, "vocab": 512}


@dataclass(frozen=True)
class Part:
    """A command whose last line is JSON, and how many seconds it may take."""

    name: str
    command: list[str]
    seconds: float
    exit_codes: tuple[int, ...] = (0,)
    """1 of a comparison says that its tolerance, made for fp32, was passed: a figure to look at."""


def flags(values: dict[str, int]) -> list[str]:
    """Options of a command."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def step(draft: str, shape: dict[str, int], case: str, args: argparse.Namespace) -> list[str]:
    """One training step beside the peers, or alone without them."""
    command = [
        sys.executable, str(HERE / "train_step.py"), "--draft", draft, "--json", "--profile",
        "--device", args.device, "--cases", case, *flags(shape),
    ]  # fmt: skip
    command += ["--steps", "1" if args.rehearse else "10"]
    command += ["--tokens", "64" if args.rehearse else "2048"]
    peers = ["--peers-python", str(args.peers_python)] if args.peers_python else ["--alone"]
    return [*command, *peers]


def parts(args: argparse.Namespace, folder: Path) -> list[Part]:
    """All parts, in the order in which one wants to know."""
    python, own = sys.executable, [sys.executable, str(HERE / "gpu_parts.py")]
    where = ["--device", args.device, *(["--rehearse"] if args.rehearse else [])]
    small, large = (TOY | {"draft-vocab": 448},) * 2 if args.rehearse else (SMALL, LARGE)
    recorded = sorted(str(path) for path in (ROOT / "tests" / "parity").glob("*.npz"))
    parity = [python, str(HERE / "parity.py"), "--device", args.device]
    dflash = {name: value for name, value in small.items() if name != "draft-vocab"}
    layers = {"layers": 2, "block-size": 4} if args.rehearse else {}
    return [
        Part("machine", [*own, "machine", *where], 90),
        Part("tests", [*own, "tests", *where], 150),
        Part("parity float32", [*parity, *recorded], 60),
        Part("parity bfloat16", [*parity, "--dtype", "bfloat16", *recorded], 60, (0, 1)),
        Part("eagle3 0.6B 1 x 2048", step("eagle3", small, "half_prompt", args), 120),
        Part("eagle3 0.6B packed", step("eagle3", small, "packed", args), 120),
        Part("dflash 0.6B 1 x 2048", step("dflash", dflash | layers, "hard", args), 120),
        Part("eagle3 8B 1 x 2048", step("eagle3", large, "half_prompt", args), 180),
        Part("target 0.6B", [*own, "target", *where], 90),
        Part("training", [*own, "training", *where, "--folder", str(folder)], 150),
        Part("resume", [*own, "resume", *where, "--folder", str(folder)], 150),
    ]


def outcome(part: Part, seconds: float) -> dict[str, Any]:
    """Run a part; its JSON, or why there is none."""
    began = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    )}  # fmt: skip
    limit = min(part.seconds, seconds)
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own commands, too
        process.communicate()
        return {"failed": f"not done after {limit:.0f} s"}
    took = {"exit_code": process.returncode, "seconds": round(time.monotonic() - began, 1)}
    lines = output.strip().splitlines()
    try:
        result = {**json.loads(lines[-1]), **took}
    except (IndexError, ValueError):
        return {"failed": (errors or output)[-2000:], **took}
    return result if process.returncode in part.exit_codes else {"failed": "exit code", **result}


def main() -> int:
    """Run all parts that there is time for; 0 when each ended well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--seconds", type=float, default=520.0, help="for everything")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small shapes")
    parser.add_argument("--only", help="the parts whose name begins so")
    parser.add_argument("--peers-python", type=Path, help="an interpreter that has the peers")
    args = parser.parse_args()
    args.device = "cpu" if args.rehearse else "cuda"
    end = time.monotonic() + args.seconds
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for part in parts(args, Path(folder)):
            if args.only and not part.name.startswith(args.only):
                continue
            left = end - time.monotonic()
            failure: dict[str, Any] = {"failed": "no time was left"}
            results[part.name] = outcome(part, left) if left > 1 else failure
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{part.name}: {json.dumps(results[part.name])[:300]}", flush=True)
    print(json.dumps(results))
    good = all("failed" not in result for result in results.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
