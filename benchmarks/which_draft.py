"""Which draft? All five for a target, with about equal CPU seconds of training.

    python benchmarks/which_draft.py [--seconds 60] [--seeds 0 1 2] [--drafts eagle3 peagle ...]
    python benchmarks/which_draft.py --steps eagle3=150 dflash=230      # instead of calibrating
    python benchmarks/which_draft.py --target smollm2 --seconds 300 --seeds 0

A draft is calibrated by two short runs (their difference is the price of a step), then trained for
as many steps as the seconds pay, exported and benched greedy and at temperature 1. For the tiny
target rate, schedule and shape are the shipped recipes', the prompts those of
experiment=quickstart, and 7 tokens are guessed; SmolLM2-135M (runs/fetch_smollm2.py comes first)
has 18 prompts of experiment=smollm2, and 5.
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
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "artifacts" / "checkpoints"
TINY, TINY_BLOCK = ["experiment=quickstart", "lr=8e-3"], ["experiment=dflash_tiny", "lr=6e-3"]
SMALL = ["experiment=smollm2", "threads=1", "loss=baseline", "epochs=5", "trainer.eval_every=1000"]
SMALL_BLOCK = (
    "draft.draft_vocab_size=8192 draft.block_size=6 draft.num_layers=2 draft.num_features=3 "
    "draft.num_anchors=32 draft.loss_gamma=4 draft.start=target trainer.schedule=wsd"
).split()


@dataclass(frozen=True)
class Target:
    """What is trained for it, and how that is measured."""

    data: list[str]
    bench: list[str]
    drafts: dict[str, list[str]]


TARGETS = {
    "tiny": Target(
        data=["experiment=quickstart"],
        bench=["bench.chain_length=7"],
        drafts={
            "eagle3": [*TINY, "epochs=20"],
            "peagle": [*TINY, "epochs=20", "draft=peagle"],
            "dflash": [*TINY_BLOCK, "epochs=20"],
            "dspark": [
                *TINY_BLOCK, "epochs=20", "draft=dspark", "loss=baseline", "draft.block_size=7",
            ],
            "standalone": [
                "experiment=quickstart", "epochs=20", "draft=standalone", "loss=baseline",
                "lr=4e-3",
            ],
        },
    ),
    "smollm2": Target(
        data=["experiment=smollm2"],
        bench=[
            "bench.chain_length=5", "bench.max_tokens=40",
            *(f"bench.datasets.{name}.limit=6" for name in ("chat", "humaneval", "gsm8k")),
        ],
        drafts={
            "eagle3": [*SMALL, "lr=2e-3"],
            "peagle": [*SMALL, "lr=2e-3", "draft=peagle", "draft.draft_vocab_size=8192"],
            "dflash": [*SMALL, "lr=2e-3", "draft=dflash", *SMALL_BLOCK],
            "dspark": [*SMALL, "lr=2e-3", "draft=dspark", "loss=baseline", *SMALL_BLOCK],
            "standalone": [*SMALL, "lr=1e-3", "draft=standalone"],
        },
    ),
}  # fmt: skip
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


@dataclass(frozen=True)
class Recipe:
    """A draft for a target, and where its runs lie."""

    target: str
    draft: str

    def run(self, seed: int, steps: int) -> str:
        """The name of a run."""
        return f"which-{self.target}-{self.draft}-{steps}-{seed}"

    def options(self, seed: int, steps: int) -> list[str]:
        """What all stages of a run are given."""
        own = TARGETS[self.target].drafts[self.draft]
        return [*own, f"run_name={self.run(seed, steps)}", f"seed={seed}", f"max_steps={steps}"]


def train(recipe: Recipe, seed: int, steps: int) -> float:
    """CPU seconds of a training, as noted when it ended; one that was interrupted starts again."""
    folder = CHECKPOINTS / recipe.run(seed, steps)
    note = folder.with_suffix(".cpu")
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)  # or its seconds would be those of its end alone
        note.write_text(str(stage("train", recipe.options(seed, steps))))
    return float(note.read_text())


def affordable(recipe: Recipe, seconds: float) -> int:
    """Steps that so many CPU seconds pay, start and evaluations included."""
    few, many = (train(recipe, 0, steps) for steps in SHORT)
    price = (many - few) / (SHORT[1] - SHORT[0])
    return max(1, int((seconds - few) / price) + SHORT[0])


def measured(recipe: Recipe, seed: int, steps: int, bench: str) -> dict[str, float]:
    """The figures of a trained draft, made where they are missing."""
    options = recipe.options(seed, steps)
    stage("export", options)
    stage("bench", [*options, *TARGETS[recipe.target].bench, *BENCHES[bench]])
    folder = CHECKPOINTS / recipe.run(seed, steps)
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


def row(recipe: Recipe, steps: int, seeds: list[int], benches: list[str]) -> str:
    """A draft's line of the table."""
    cells = [recipe.draft, str(steps), spread([train(recipe, seed, steps) for seed in seeds])]
    for bench in benches:
        figures = [measured(recipe, seed, steps, bench) for seed in seeds]
        cells += [spread([each[key] for each in figures]) for key in figures[0]]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse, train, measure, print."""
    kinds = list(TARGETS["tiny"].drafts)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, default="tiny")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--drafts", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--benches", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--steps", nargs="*", default=[], metavar="DRAFT=STEPS")
    args = parser.parse_args()
    given = dict(each.partition("=")[::2] for each in args.steps)
    for name in ("prep", "regen", "preprocess"):
        stage(name, TARGETS[args.target].data)
    heads = [f"{key}, {bench}" for bench in args.benches for key in ("tau", "forwards", "verified")]
    print(f"| {' | '.join(['draft', 'steps', 'CPU s', *heads])} |")
    print("|---" * (3 + len(heads)) + "|", flush=True)
    for draft in args.drafts:
        recipe = Recipe(args.target, draft)
        steps = int(given[draft]) if draft in given else affordable(recipe, args.seconds)
        print(row(recipe, steps, args.seeds, args.benches), flush=True)


if __name__ == "__main__":
    main()
