"""Which draft? All five for the tiny target, with about equal CPU seconds of training.

    python benchmarks/which_draft.py [--seconds 60] [--seeds 0 1 2] [--drafts eagle3 peagle ...]
    python benchmarks/which_draft.py --steps eagle3=150 dflash=230      # instead of calibrating

A draft is calibrated by two short runs (their difference is the price of a step), then trained for
as many steps as the seconds pay, exported and benched on the prompts of experiment=quickstart:
7 guessed tokens, greedy and at temperature 1. Rate, schedule and shape are the shipped recipes'.
Everything is in artifacts/; what is done is skipped when the same command runs again.

The table is in markdown: means over the seeds, and their range. `CPU s` is user and system time of
train.py; `forwards` how many times fewer the target's are than without a draft (mean over the data
sets); `verified` how many tokens the target verifies for each that is gained.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "artifacts" / "checkpoints"
EAGLE = ["experiment=quickstart", "lr=8e-3"]
BLOCK = ["experiment=dflash_tiny", "lr=6e-3"]
DRAFTS = {
    "eagle3": EAGLE,
    "peagle": [*EAGLE, "draft=peagle"],
    "dflash": BLOCK,
    "dspark": [*BLOCK, "draft=dspark", "loss=baseline", "draft.block_size=7"],
    "standalone": ["experiment=quickstart", "draft=standalone", "loss=baseline", "lr=4e-3"],
}
BENCHES: dict[str, list[str]] = {
    "greedy": ["bench.name=greedy"],
    "sampled": ["bench.name=sampled", "bench.temperature=1.0"],
}
SHORT = (10, 50)
"""Steps of the two runs that calibrate."""


def stage(name: str, options: list[str]) -> float:
    """Run a stage; CPU seconds of it and of what it started.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    command = [sys.executable, f"{name}.py", *options]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=variables, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def options_of(draft: str, seed: int, steps: int) -> list[str]:
    """What all stages of a run are given."""
    run = f"which-{draft}-{steps}-{seed}"
    return [*DRAFTS[draft], f"run_name={run}", f"seed={seed}", "epochs=20", f"max_steps={steps}"]


def train(draft: str, seed: int, steps: int) -> float:
    """CPU seconds of a training, as noted when it ended; one that was interrupted starts again."""
    folder = CHECKPOINTS / f"which-{draft}-{steps}-{seed}"
    note = folder.with_suffix(".cpu")
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)  # or its seconds would be those of its end alone
        note.write_text(str(stage("train", options_of(draft, seed, steps))))
    return float(note.read_text())


def affordable(draft: str, seconds: float) -> int:
    """Steps that so many CPU seconds pay, start and evaluations included."""
    few, many = (train(draft, 0, steps) for steps in SHORT)
    price = (many - few) / (SHORT[1] - SHORT[0])
    return max(1, int((seconds - few) / price) + SHORT[0])


def measured(draft: str, seed: int, steps: int, bench: str) -> dict[str, float]:
    """The figures of a trained draft, made where they are missing."""
    options = options_of(draft, seed, steps)
    stage("export", options)
    stage("bench", [*options, "bench.chain_length=7", *BENCHES[bench]])
    folder = CHECKPOINTS / f"which-{draft}-{steps}-{seed}"
    result = json.loads((folder / f"bench-{bench}.json").read_text())
    sets: list[dict[str, Any]] = list(result["datasets"].values())
    return {
        "tau": result["average"],
        "forwards": mean(1 / (1 - each["target_forwards_saved"]) for each in sets),
        "verified": mean(each["verified_per_token"] for each in sets),
    }


def spread(values: list[float]) -> str:
    """Mean and range."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def row(draft: str, steps: int, seeds: list[int], benches: list[str]) -> str:
    """A draft's line of the table."""
    cells = [draft, str(steps), spread([train(draft, seed, steps) for seed in seeds])]
    for bench in benches:
        figures = [measured(draft, seed, steps, bench) for seed in seeds]
        cells += [spread([each[key] for each in figures]) for key in figures[0]]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse, train, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--drafts", nargs="+", choices=DRAFTS, default=list(DRAFTS))
    parser.add_argument("--benches", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--steps", nargs="*", default=[], metavar="DRAFT=STEPS")
    args = parser.parse_args()
    given = dict(each.partition("=")[::2] for each in args.steps)
    for name in ("prep", "regen", "preprocess"):
        stage(name, ["experiment=quickstart"])
    heads = [f"{key}, {bench}" for bench in args.benches for key in ("tau", "forwards", "verified")]
    print(f"| {' | '.join(['draft', 'steps', 'CPU s', *heads])} |")
    print("|---" * (3 + len(heads)) + "|", flush=True)
    for draft in args.drafts:
        steps = int(given[draft]) if draft in given else affordable(draft, args.seconds)
        print(row(draft, steps, args.seeds, args.benches), flush=True)


if __name__ == "__main__":
    main()
