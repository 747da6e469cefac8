"""SpecForge 0.2.0's preprocessing and vocabulary map, through the installed package, timed.

    cd benchmarks && python -m peers.specforge_preprocess tokenise DATA TOKENIZER OUT
    cd benchmarks && python -m peers.specforge_preprocess vocabulary COUNTS DRAFT OUT

Runs in the environment that benchmarks/train_step.py makes. `tokenise` is build_eagle3_dataset in
this process, its shuffle undone afterwards; `vocabulary` is process_token_dict_to_mappings.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np


def tokenise(data: Path, tokenizer_path: str, options: dict[str, Any], out: Path) -> dict[str, Any]:
    """Conversations to ids and masks; the measured time starts with the file on disk."""
    from datasets import Dataset
    from specforge.data.preprocessing import build_eagle3_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    start, cpu = time.perf_counter(), time.process_time()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    dataset = Dataset.from_list([{"conversations": row["conversations"]} for row in rows])
    made = build_eagle3_dataset(
        dataset, tokenizer, options["template"], options["max_length"], num_proc=None
    )
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    order = Dataset.from_dict({"row": list(range(len(rows)))}).shuffle(seed=42)["row"]
    places = np.argsort(np.array(order))
    ids = [np.array(made[int(place)]["input_ids"][0], np.int32) for place in places]
    masks = [np.array(made[int(place)]["loss_mask"][0], bool) for place in places]
    np.savez(out, ids=np.concatenate(ids), mask=np.concatenate(masks), lengths=[*map(len, ids)])
    tokens = sum(map(len, ids))
    return {"seconds": wall, "cpu_s": cpu, "conversations": len(rows), "tokens": tokens}


def vocabulary(counts: Path, draft: int, out: Path) -> dict[str, Any]:
    """Counts to d2t and t2d."""
    from specforge.data.preprocessing import process_token_dict_to_mappings

    counts_V = np.load(counts)
    found = Counter({int(i): int(counts_V[i]) for i in np.flatnonzero(counts_V)})
    start, cpu = time.perf_counter(), time.process_time()
    d2t, t2d = process_token_dict_to_mappings(found, draft, len(counts_V))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    np.savez(out, d2t=d2t.numpy(), t2d=t2d.numpy())
    return {"seconds": wall, "cpu_s": cpu, "ids": len(found)}


if __name__ == "__main__":
    import tokenizers

    what, *rest = sys.argv[1:]
    if what == "tokenise":
        result = tokenise(Path(rest[0]), rest[1], json.loads(rest[2]), Path(rest[3]))
    else:
        result = vocabulary(Path(rest[0]), int(rest[1]), Path(rest[2]))
    who = {"who": "specforge", "what": what, "tokenizers": tokenizers.__version__}
    print(json.dumps({**who, **result}))
