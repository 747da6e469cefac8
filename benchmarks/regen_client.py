"""What the client of a regeneration costs: every record through an engine that answers at once.

    python benchmarks/regen_client.py make|whole|resume <folder> <records>

`make` writes the records (1 KB, two messages), `whole` regenerates all of them, `resume` takes a
tenth of the results away and measures the time from the start of the process until an answer is
asked for again. The last line of stdout is a JSON object.
"""

import asyncio
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / part) for part in (".", "tests")]

import orjson  # noqa: E402
from instant_engine import rules  # noqa: E402

from specforge_exp.artifacts import sha256  # noqa: E402
from specforge_exp.generation.engine import Answer, Request, Unreachable  # noqa: E402
from specforge_exp.generation.progress import Progress  # noqa: E402
from specforge_exp.generation.run import RateLimit, Regeneration, answer_missing  # noqa: E402
from specforge_exp.generation.store import Store  # noqa: E402
from specforge_exp.interrupt import Interrupt  # noqa: E402

REPLY = {"role": "assistant", "content": "answer " * 70}


class AtOnce:
    """Answers without waiting; the first request may end the run."""

    servers = 1

    def __init__(self, stop: bool) -> None:
        self.stop, self.first = stop, 0.0

    async def answer(self, request: Request) -> Answer:
        """See `generation.engine.Engine`."""
        self.first = self.first or time.time()
        if self.stop:
            raise Unreachable("stop here")
        return Answer(REPLY, "stop", 100, 140)

    async def close(self) -> None:
        """Nothing is held."""


def make(source: Path, records: int) -> None:
    """Conversations of one KB."""
    draw = random.Random(0)
    with source.open("wb") as file:
        for number in range(records):
            question = "".join(draw.choices("abcdefgh ", k=100)) + " question" * 30
            messages = [{"role": "user", "content": question}, REPLY]
            file.write(orjson.dumps({"id": f"c{number}", "conversations": messages}) + b"\n")


def regenerate(folder: Path, source: Path, stop: bool) -> tuple[Store, AtOnce]:
    """All that `regen` does with a file, without its log and its run.json."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    engine = AtOnce(stop)
    with Interrupt() as interrupt:
        store = Store(out, {source: sha256(source)}, 256, None, 1)
        job = Regeneration(store, engine, rules(), RateLimit(None), Progress(store, interrupt))
        try:
            asyncio.run(answer_missing(job, 64, 1.0))
        except Unreachable:
            return store, engine
        with (out / "train.jsonl").open("wb") as done, (out / "failed.jsonl").open("wb") as failed:
            store.merge(store.plans[0], done, failed)
    return store, engine


def process_start() -> float:
    """When this process was made, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def main() -> None:
    """One step, its figures as JSON."""
    step, folder, records = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    source = folder / "train.jsonl"
    found: dict[str, Any] = {}
    if step == "make":
        make(source, records)
    elif step == "whole":
        before = time.process_time()
        store, _ = regenerate(folder, source, stop=False)
        assert store.counts.done == records
        found["client_us_per_record"] = (time.process_time() - before) / records * 1e6
        found["client_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        found["client_seconds"] = time.time() - process_start()
    else:
        shards = sorted((folder / "out" / "shards").iterdir())
        for shard in random.Random(0).sample(shards, max(1, len(shards) // 10)):
            shard.unlink()
        store, engine = regenerate(folder, source, stop=True)
        found["resume_done"] = store.counts.done
        found["resume_start_s"] = engine.first - process_start()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
