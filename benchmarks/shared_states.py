"""Twelve runs of a grid with one fleet against twelve with a fleet each: what the target does.

    python benchmarks/shared_states.py [--json] [--steps 12] [--places 12] [--own-places 3]

Four losses times three rates train EAGLE-3 on the tiny target, once with target.share=sweep, all at
the same time, and once with workers of their own, fewer at a time, since each has a cluster of Ray
(1.5 GB). The losses must be equal to the bit. Reported are conversations that the target was run
on, CPU seconds of all processes, and wall seconds of the command. The last line is JSON.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER: orphans become this process's, so that they are found below it."""
SHARED = r"the target ran on (\d+) conversations"
OWN = r"states of (\d+) conversations asked for"


def words(folder: Path, steps: int) -> list[str]:
    """Options of both sweeps."""
    return [
        "experiment=smoke", "model=tiny", "data.name=shared", "preprocess.source=prep",
        f"data.train=[{{path: 'synthetic:train', limit: {4 * steps}}}]",
        "data.eval=[{path: 'synthetic:eval', limit: 4}]", "max_length=512",
        f"paths.datasets={folder / 'datasets'}", f"max_steps={steps}", "epochs=1",
        "trainer.batch_size=4", "trainer.log_every=1",
    ]  # fmt: skip


def run(command: list[str]) -> tuple[str, dict[str, Any]]:
    """What a command printed, and its wall and CPU seconds, all that it started included."""
    spent: dict[tuple[str, str], int] = {}
    over, began = threading.Event(), time.monotonic()
    looking = threading.Thread(target=look, args=(spent, over))
    looking.start()
    done = subprocess.run(command, cwd=HERE, check=False, capture_output=True, text=True)
    wall = time.monotonic() - began
    over.set()
    looking.join()
    if done.returncode:
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])
    cpu = sum(spent.values()) / os.sysconf("SC_CLK_TCK")
    return done.stdout + done.stderr, {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1)}


def look(spent: dict[tuple[str, str], int], over: threading.Event) -> None:
    """Note the CPU ticks of each process below this one, by id and start: nobody asks what Ray's
    processes have used, as it does not wait for them."""
    while not over.wait(0.2):
        parents: dict[str, tuple[str, str, int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                parents[stat.parent.name] = fields[1], fields[19], int(fields[11]) + int(fields[12])
        for pid, (_, born, ticks) in parents.items():
            above = pid
            while above in parents and above != str(os.getpid()):
                above = parents[above][0]
            if above != pid and above == str(os.getpid()):
                spent[pid, born] = ticks


def sweep(folder: Path, name: str, common: list[str], *more: str) -> dict[str, Any]:
    """Run the grid; what it cost, and every loss of every run."""
    checkpoints = folder / name
    grid = ["loss=glob(*)", "lr=5e-4,1e-3,2e-3"]
    command = [sys.executable, str(HERE / "train.py"), "-m", *common, *grid, *more,
               "target.placement=ray", f"paths.checkpoints={checkpoints}"]  # fmt: skip
    printed, result = run(command)
    outs = [file.read_text() for file in sorted(checkpoints.glob("sweeps/*/train/*/train.out"))]
    pattern, texts = (SHARED, [printed]) if name == "shared" else (OWN, outs)
    result["runs"] = len(outs)
    result["target_forwards"] = sum(int(n) for text in texts for n in re.findall(pattern, text))
    result["losses"] = {
        file.parent.name: [line.get("loss") for line in map(json.loads, file.open())]
        for file in checkpoints.glob("*/metrics.jsonl")
    }
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--places", type=int, default=12, help="runs at a time, with one fleet")
    parser.add_argument(
        "--own-places", type=int, default=3, help="the same, with fleets of their own"
    )
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = words(folder, args.steps)
        for stage in ("prep", "preprocess"):
            run([sys.executable, str(HERE / f"{stage}.py"), *common])
        shared = ["target.share=sweep", f"hydra.sweeper.n_jobs={args.places}"]
        results = {
            "shared": sweep(folder, "shared", common, *shared),
            "own": sweep(folder, "own", common, f"hydra.sweeper.n_jobs={args.own_places}"),
        }
    losses = [result.pop("losses") for result in results.values()]
    equal = losses[0] == losses[1] and len(losses[0]) == 12
    if not args.json:
        for kind, result in results.items():
            print(kind, *(f"{key} {value}" for key, value in result.items()), sep="  ")
    print(json.dumps({"runs": results, "load": os.getloadavg()[0], "equal": equal}))


if __name__ == "__main__":
    main()
