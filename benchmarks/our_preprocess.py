"""Our preprocessing and vocabulary map, timed: what benchmarks/preprocess.py runs.

    python benchmarks/our_preprocess.py tokenise DATA TOKENIZER OPTIONS OUT
    python benchmarks/our_preprocess.py vocabulary COUNTS DRAFT OUT

`tokenise` goes from the file on disk to shards on disk, in this process.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from specforge_exp.config import Config, DataConfig, LossConfig, ModelConfig
from specforge_exp.data.blocks import cut, encode_block, make_chat
from specforge_exp.data.tokens import read_split
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.stages.preprocess import TokenSplit, merge


def tokenise(data: Path, tokenizer: str, options: dict[str, Any], out: Path) -> dict[str, Any]:
    """Conversations to shards; the arrays that all of them hold go to `out`."""
    cfg = Config(
        run_name="benchmark",
        max_length=options["max_length"],
        model=ModelConfig(name="target", path=tokenizer),
        data=DataConfig(name="chats"),
        loss=LossConfig(name="baseline", lambda_ce=1.0),
        draft=Eagle3Config(name="eagle3"),
    )
    chat = make_chat(cfg)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "blocks").mkdir()
        start, cpu = time.perf_counter(), time.process_time()
        blocks = cut(data)
        for block in blocks:
            encode_block(block, chat, cfg, folder / "blocks")
        split = merge(cfg, TokenSplit(data, np.zeros(options["vocab"], np.int64)), blocks, folder)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        (folder / "index.json").write_text(json.dumps({data.stem: split.shards}))
        tokens = read_split(folder, data.stem)
    ids, turns = (torch.cat(column) for column in zip(*tokens, strict=True))
    ends = torch.isin(ids, torch.tensor(sorted(chat.eos)))
    np.savez(
        out,
        ids=ids.numpy(),
        mask=(turns > 0).numpy(),
        ends=ends.numpy(),
        lengths=tokens.lengths,
        counts=split.counts_V,
    )
    counted = {"conversations": split.account["read"], "tokens": len(ids)}
    return {"seconds": wall, "cpu_s": cpu, **counted, "kept": len(tokens)}


def vocabulary(counts: Path, draft: int, out: Path) -> dict[str, Any]:
    """Counts to d2t and t2d."""
    counts_V = np.load(counts)
    start, cpu = time.perf_counter(), time.process_time()
    mapping = vocabulary_mapping(torch.from_numpy(counts_V), draft)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    np.savez(out, d2t=mapping["d2t"].numpy(), t2d=mapping["t2d"].numpy())
    return {"seconds": wall, "cpu_s": cpu, "ids": int((counts_V > 0).sum())}


def main() -> None:
    """Measure what the command line names; prints one line of JSON."""
    what, *rest = sys.argv[1:]
    if what == "tokenise":
        result = tokenise(Path(rest[0]), rest[1], json.loads(rest[2]), Path(rest[3]))
    else:
        result = vocabulary(Path(rest[0]), int(rest[1]), Path(rest[2]))
    who = {"who": "ours", "what": what, "tokenizers": tokenizers.__version__}
    print(json.dumps({**who, **result}))


if __name__ == "__main__":
    main()
