"""A training step of a draft: ours beside SpecForge 0.2.0 and speculators 0.9.0.

    python benchmarks/train_step.py [--json] [--steps 5] [--threads 2] [--device cpu|cuda]
    python benchmarks/train_step.py --growth          # time and memory, 512 to 4096 tokens
    python benchmarks/train_step.py --draft dflash|dspark|peagle [--json]
    python benchmarks/train_step.py --tokens 2048 --alone   # longer conversations; ours alone
    python benchmarks/train_step.py --instructions --hidden 128 ...   # what load does not move

Everybody gets the same weights, inputs and supervised rows, in a process of its own; they take
turns step by step, so that a slow minute of the machine slows all, and threads that wait sleep. At
the default size each holds 10 to 16 GB, so where less than 48 GB are free, or with --apart, one
ends before the next begins. Measured are medians of process CPU time (CUDA: wall time), wall time
and activation memory (peers/measure.py). EAGLE-3's ratios are to SpecForge with its compact
teacher; DFlash's to the better peer, which may be one for time and the other for memory. With
--instructions ratios of time are those of counted instructions of one step, by valgrind's callgrind
(which has no AVX-512): 50 times slower, so only for small sizes.

    unmasked     one conversation of 512 tokens, everything supervised
    half_prompt  the same, its first half a prompt
    packed       conversations of 64, 128, .. 512 tokens, half prompt: one padded batch for
                 SpecForge, packed for speculators and us

DFlash's cases (half prompt, an anchor for 8 tokens, blocks of 16, 5 layers, 5 states of the target,
the target's whole vocabulary; the same anchors for everybody, see peers/dflash_inputs.py):

    hard         one conversation of 512 tokens, cross-entropy against the text
    packed       conversations of 64, 128, 192, 256 tokens, the same loss; padded for SpecForge
    kl_div       as hard, with speculators' default loss, which SpecForge has not

DSpark's (as DFlash's, blocks of 7 from the anchor on, rank 256, 0.1 hard + 0.9 TV + confidence; its
peer is speculators):

    one          one conversation of 512 tokens
    several      conversations of 64, 128, 192, 256 tokens

P-EAGLE's (half prompt, 8 depths, the same rows for everybody, see peers/peagle_inputs.py; its peer
is speculators):

    one_layer    one conversation of 512 tokens
    four_layers  the same, four layers

Losses are compared at one divisor, the sum of the labels' weights; the summary has `loss_rel`, the
largest relative difference of a peer's to ours.
On CUDA our step takes part twice, by few kernels and, `in_order`, in the order of a CPU's sums.

The peers run in a virtual environment that the first run makes (a few minutes, 2 GB), eagerly on a
CPU. matmul_share is the needed FLOP (objective.flops: nothing for what is computed twice) over wall
time, against a 2048^3 product in the same process.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from peers import dflash_inputs
from peers.counted import callgrind
from peers.inputs import Shape, make_chats, make_weights, save, vocabulary
from peers.speculators_record import all_weights

HERE = Path(__file__).resolve().parent
CASES = {
    "unmasked": ([512], 0.0),
    "half_prompt": ([512], 0.5),
    "packed": (list(range(64, 513, 64)), 0.5),
}
DFLASH_CASES = {
    "hard": ([512], "hard"),
    "packed": ([64, 128, 192, 256], "hard"),
    "kl_div": ([512], "kl_div"),
}
DSPARK_CASES = {"one": ([512], "dspark"), "several": ([64, 128, 192, 256], "dspark")}
DSPARK = {"block_size": 7, "loss_gamma": 4.0, "sample_from_anchor": True, "markov_rank": 256}
PEAGLE_CASES = {"one_layer": 1, "four_layers": 4}
AT_ONCE = 48 * 2**30
"""Bytes that have to be free for processes of the default size to take turns."""
DFLASH_EVERY = 8
"""Tokens for each anchor."""
PEERS = ("specforge", "speculators")
HEADING = (
    f"{'case':12} {'who':19} {'rows':>6} {'loss':>8} {'CPU s':>8} {'wall s':>8} "
    f"{'activation':>10} {'time':>6} {'memory':>7} {'matmul':>7}"
)
INSTALLS = [
    ["torch==2.13.0"],
    ["transformers==5.8.1", "numpy", "safetensors", "pydantic", "pyyaml", "triton", "openai",
     "aiohttp", "datasets", "loguru", "rich", "typer", "pydantic-settings", "httpx"],
    ["--no-deps", "specforge==0.2.0", "speculators==0.9.0", "hs-connectors==0.9.0"],
]  # fmt: skip


def peers_python(venv: Path, installs: list[list[str]] = INSTALLS) -> Path:
    """The interpreter of the peers' environment, made when it is missing."""
    python, ready = venv / "bin" / "python", venv / "ready"
    if not ready.exists():
        print(f"making {venv} for the peers", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        for packages in installs:
            command = [str(python), "-m", "pip", "install", "--quiet", *packages]
            subprocess.run([*command, "--disable-pip-version-check"], check=True)
        ready.touch()
    return python


class Step:
    """A measurement in a process of its own; it sets up, warms up, and waits for its turns."""

    def __init__(self, who: str, file: Path, args: argparse.Namespace, *more: str) -> None:
        """`who` is a module here: a peer's, which the peers' interpreter runs, or ours."""
        python = (args.peers_python or peers_python(args.venv)) if "." in who else sys.executable
        command = [str(python), "-m", who, str(file), "--shape", json.dumps(args.shape)]
        command += ["--threads", str(args.threads), "--steps", str(args.steps), "--turns"]
        command += ["--device", args.device, *more]
        if args.instructions:
            output = file.with_name("".join([who, *more, ".callgrind"]))
            command = [*callgrind(output), *command, "--instructions", str(output)]
        threads = {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "passive"}
        variables = {**os.environ, **threads}
        if args.device == "cpu":
            variables["TORCHDYNAMO_DISABLE"] = "1"
        self.who, self.log = who, file.with_name("".join([who, *more, ".log"]))
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=variables, cwd=HERE, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self.said = self.hear()

    def hear(self) -> str:
        """The next line: ready for a step, or the result as JSON."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line == "ready\n" or line.startswith("{"):
                return str(line)
        code = self.process.wait()
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if code == -signal.SIGKILL:
            how += ", as the kernel does where memory is short; --apart holds one process at a time"
        raise SystemExit(f"{self.who} failed: {how}\n{self.log.read_text()[-3000:]}")

    def take_turn(self) -> None:
        """One step, to its end."""
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it is gone; what is heard says how
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.said = self.hear()

    def end(self) -> None:
        """No process and no pipe is left."""
        self.process.kill()
        self.process.communicate()


def short_of_memory() -> bool:
    """Whether three processes of the default size may not fit beside each other."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 < AT_ONCE


def run(file: Path, args: argparse.Namespace, *steps: tuple[str, ...]) -> list[Any]:
    """Measure modules, each with its options: in turns, or one after the other (args.apart)."""
    if args.apart and len(steps) > 1:
        return [result for step in steps for result in run(file, args, step)]
    measured: list[Step] = []
    try:
        for who, *more in steps:
            measured.append(Step(who, file, args, *more))
        for _ in range(args.steps):
            for step in measured:
                step.take_turn()
        return [json.loads(step.said) for step in measured]
    finally:
        for step in measured:
            step.end()


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sizes asked for; by default Qwen3-0.6B's, for EAGLE-3 with 32000 draft tokens."""
    kind = dflash_inputs.Shape if args.draft in ("dflash", "dspark") else Shape
    own = [name for name in vars(kind()) if getattr(args, name, None) is not None]
    usual = DSPARK if args.draft == "dspark" else {}
    return usual | {name: getattr(args, name) for name in own}


def scaled(lengths: list[int], args: argparse.Namespace) -> list[int]:
    """A case's lengths where 512 tokens are as many as were asked for."""
    return [length * args.tokens // 512 for length in lengths]


def show(case: str, result: dict[str, Any], base: dict[str, Any], time: str) -> None:
    """One line of the table."""
    print(
        f"{case:12} {result['who']:19} {result['rows']:6} {result['loss']:8.4f} "
        f"{result['cpu_s']:8.2f} {result['wall_s']:8.2f} {result['activation_mb']:10.0f} "
        f"{result[time] / base[time]:6.2f} {result['activation_mb'] / base['activation_mb']:7.2f} "
        f"{result.get('matmul_share', float('nan')):7.2f}",
        flush=True,
    )


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cases: prints the table and returns the summary."""
    shape = Shape(**args.shape)
    weights = make_weights(shape, seed=0)
    chats = {
        case: make_chats(shape, scaled(CASES[case][0], args), CASES[case][1], seed=1)
        for case in args.cases
    }
    weights |= vocabulary(shape, weights, list(chats.values()))
    print(HEADING)
    summary: dict[str, Any] = {"cases": {}, "matmul_share": None, "runs": []}
    for case in args.cases:
        file = folder / "inputs.npz"
        save(file, weights, chats[case])
        steps: list[tuple[str, ...]] = [] if args.alone else [(f"peers.{p}_step",) for p in PEERS]
        profile = ["--profile"] if args.profile else []
        more = [("our_step", "--checkpointing")] if case == "unmasked" else []
        if args.device != "cpu":
            more.append(("our_step", "--in-order"))
        results = run(file, args, *steps, ("our_step", *profile), *more)
        base, ours = results[0], results[len(steps)]
        if case == "unmasked":
            summary["matmul_share"] = ours.get("matmul_share")
        for other in results[len(steps) + 1 :]:
            summary[other["who"].removeprefix("ours+")] = {
                "cpu_ratio_to_ours": other[args.time] / ours[args.time],
                "activation_ratio": other["activation_mb"] / base["activation_mb"],
            }
        for result in results:
            show(case, result, base, args.time)
            summary["runs"].append({"case": case, **result})
        summary["cases"][case] = {
            "cpu_ratio": ours[args.time] / base[args.time],
            "activation_ratio": ours["activation_mb"] / base["activation_mb"],
        }
        if ours["rows"] != base["rows"] or abs(ours["loss"] / base["loss"] - 1) > 1e-4:
            print(f"warning: {case}: rows or loss differ from SpecForge's", file=sys.stderr)
    return summary


def compare_dflash(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cases of DFlash or DSpark: prints the table and returns the summary."""
    shape = dflash_inputs.Shape(**args.shape)
    weights = dflash_inputs.make_weights(shape, seed=0)
    print(HEADING)
    summary: dict[str, Any] = {"cases": {}, "matmul_share": None, "runs": []}
    file = folder / "inputs.npz"
    for case in args.cases:
        lengths, loss = (DFLASH_CASES | DSPARK_CASES)[case]
        head_VH = weights["lm_head.weight"]
        tokens = scaled(lengths, args)
        save(file, weights, dflash_inputs.make_chats(shape, head_VH, tokens, 0.5, DFLASH_EVERY))
        names = () if args.alone else PEERS if loss == "hard" else PEERS[1:]
        who = [*(f"peers.{peer}_dflash_step" for peer in names), "our_dflash_step"]
        steps: list[tuple[str, ...]] = [(each, "--loss", loss) for each in who]
        profile = ("--profile",) if args.profile else ()
        *others, ours = run(file, args, *steps[:-1], (*steps[-1], *profile))
        peers = others or [ours]
        best = {key: min(peer[key] for peer in peers) for key in (args.time, "activation_mb")}
        for result in [*others, ours]:
            show(case, result, best, args.time)
            summary["runs"].append({"case": case, **result})
        summary["cases"][case] = {
            "cpu_ratio": ours[args.time] / best[args.time],
            "activation_ratio": ours["activation_mb"] / best["activation_mb"],
            "loss_rel": max(abs(peer["loss"] / ours["loss"] - 1) for peer in peers),
        }
        summary["matmul_share"] = summary["matmul_share"] or ours.get("matmul_share")
        rows = {result["rows"] for result in [*peers, ours]}
        if len(rows) > 1 or summary["cases"][case]["loss_rel"] > 1e-5:
            print(f"warning: {case}: rows or loss differ from a peer's", file=sys.stderr)
    return summary


def compare_peagle(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cases of P-EAGLE: prints the table and returns the summary."""
    args.ttt = 8
    shape, file = Shape(**shape_of(args)), folder / "inputs.npz"
    print(HEADING)
    summary: dict[str, Any] = {"cases": {}, "matmul_share": None, "runs": []}
    for case in args.cases:
        options = {"num_hidden_layers": PEAGLE_CASES[case], "mask_token_id": shape.vocab - 1}
        weights = all_weights(shape, options, 0)
        chats = make_chats(shape, scaled([512], args), 0.5, seed=1)
        save(file, weights | vocabulary(shape, weights, [chats]), chats)
        del weights
        peers = () if args.alone else ("peers.speculators_peagle_step",)
        profile = ("--profile",) if args.profile else ()
        *others, ours = run(file, args, *((who,) for who in peers), ("our_peagle_step", *profile))
        base = (others or [ours])[0]
        for result in [*others, ours]:
            show(case, result, base, args.time)
            summary["runs"].append({"case": case, **result})
        summary["cases"][case] = {
            "cpu_ratio": ours[args.time] / base[args.time],
            "activation_ratio": ours["activation_mb"] / base["activation_mb"],
            "loss_rel": abs(base["loss"] / ours["loss"] - 1),
        }
        summary["matmul_share"] = summary["matmul_share"] or ours.get("matmul_share")
        if ours["rows"] != base["rows"] or summary["cases"][case]["loss_rel"] > 1e-5:
            print(f"warning: {case}: rows or loss differ from the peer's", file=sys.stderr)
    return summary


def growth(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Growing lengths: time per supervised row, and memory per token added.

    The peers stop at 1024 tokens: their dense attention on a CPU is quadratic.
    """
    shape = Shape(**args.shape)
    weights = make_weights(shape, seed=0)
    lengths = [512, 1024, 2048, 4096]
    chats = [make_chats(shape, [length], 0.0, seed=1) for length in lengths]
    weights |= vocabulary(shape, weights, chats)
    print(f"{'who':12} {'tokens':>6} {'CPU s':>8} {'ms/row':>8} {'activation':>10} {'MB/token':>9}")
    runs: list[dict[str, Any]] = []
    before: dict[str, tuple[int, float]] = {}
    for length, chat in zip(lengths, chats, strict=True):
        file = folder / "inputs.npz"
        save(file, weights, chat)
        peers = PEERS if length <= 1024 else ()
        steps: list[tuple[str, ...]] = [(f"peers.{peer}_step",) for peer in peers]
        for one in run(file, args, ("our_step",), *steps):
            tokens, memory = before.get(one["who"], (0, 0.0))
            slope = (one["activation_mb"] - memory) / (length - tokens) if tokens else float("nan")
            before[one["who"]] = (length, one["activation_mb"])
            runs.append({"tokens": length, **one, "mb_per_token": slope if tokens else None})
            print(
                f"{one['who']:12} {length:6} {one['cpu_s']:8.2f} "
                f"{1000 * one['cpu_s'] / one['rows']:8.2f} {one['activation_mb']:10.0f} "
                f"{slope:9.3f}",
                flush=True,
            )
    return {"growth": runs}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--draft", choices=["eagle3", "dflash", "dspark", "peagle"], default="eagle3"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as the last line")
    parser.add_argument("--growth", action="store_true", help="512 to 4096 tokens, no cases")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=sorted({*CASES, *DFLASH_CASES, *DSPARK_CASES, *PEAGLE_CASES}),
    )
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one to warm up")
    parser.add_argument(
        "--tokens", type=int, default=512, help="instead of 512, all lengths in proportion"
    )
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--apart", action="store_true", help="one process alive at a time")
    parser.add_argument("--instructions", action="store_true", help="count a step's, not its time")
    parser.add_argument("--profile", action="store_true", help="count what our step launches")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--venv", type=Path, default=cache / "specforge_exp" / "peers")
    parser.add_argument("--peers-python", type=Path, help="an interpreter that has the peers")
    for name in vars(Shape()) | vars(dflash_inputs.Shape()):
        if name not in ("ttt", "rope_theta", "rms_eps", "loss_gamma"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    args = parser.parse_args()
    measures: Any = {
        "eagle3": (CASES, compare), "dflash": (DFLASH_CASES, compare_dflash),
        "peagle": (PEAGLE_CASES, compare_peagle), "dspark": (DSPARK_CASES, compare_dflash),
    }  # fmt: skip
    cases, measured = measures[args.draft]
    args.cases = args.cases or list(cases)
    if not set(args.cases) <= set(cases) or (args.growth and args.draft != "eagle3"):
        parser.error(f"--draft {args.draft} has the cases {', '.join(cases)}")
    args.shape = shape_of(args)
    usual = DSPARK if args.draft == "dspark" else {}
    args.apart = args.apart or (args.shape == usual and short_of_memory())
    args.time = "cpu_s" if args.device == "cpu" else "wall_s"
    if args.instructions:
        args.time, args.steps = "instructions", 1
        if not shutil.which("valgrind") or args.device != "cpu":
            parser.error("--instructions takes valgrind, and a CPU")
    with tempfile.TemporaryDirectory() as folder:
        summary = (growth if args.growth else measured)(args, Path(folder))
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
