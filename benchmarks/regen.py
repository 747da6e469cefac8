"""Regeneration measured: the server and its client, beside what others do with the same target.

    python benchmarks/regen.py [--json] [--runs 3] [--records 1000000]

- vs_offline_batch: tokens per second of regeneration over HTTP, by those of a loop of
  `transformers.generate` that is fed perfectly: batches as large as the server's, prompts of equal
  length, 128 new tokens each, no early end.
- vs_specforge_scheme: the same server and concurrency, 16 to 1024 new tokens; the other client
  works as SpecForge's regenerate_train_data.py does: the order of the file, servers in turn, one
  thread and one new connection per conversation, a loop that polls.
- vs_specforge_scheme_shared: 20 shared beginnings in mixed order, two servers whose caches hold
  some of them.
- client_us_per_record, client_peak_mb, resume_start_s: `regen_client.py` in a process of its own,
  with an engine that answers at once; records of 1 KB.

Servers and the loop have one thread each. Runs alternate; each figure is a ratio of medians.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from instant_engine import make_store, rules  # noqa: E402

from specforge_exp.config import (  # noqa: E402
    Config,
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
)
from specforge_exp.drafts.eagle3.config import Eagle3Config  # noqa: E402
from specforge_exp.generation.engine import Answer, Request, Sampling  # noqa: E402
from specforge_exp.generation.openai_engine import OpenAIEngine  # noqa: E402
from specforge_exp.generation.progress import Progress  # noqa: E402
from specforge_exp.generation.run import RateLimit, Regeneration, answer_missing  # noqa: E402
from specforge_exp.interrupt import Interrupt  # noqa: E402

TARGET = ROOT / "assets" / "tiny_target"
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
WORDS = "the kettle stands on a red table near old windows and Ada reads about foxes".split()
Lengths = dict[str, int]


def text(seed: int, words: int) -> str:
    """Some words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(path: Path, prompts: list[str]) -> Path:
    """Conversations of one question each."""
    lines = [
        json.dumps({"id": str(n), "conversations": [{"role": "user", "content": prompt}]})
        for n, prompt in enumerate(prompts)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@contextmanager
def server(concurrency: int, *options: str) -> Iterator[str]:
    """Base URL of a server with the tiny target."""
    command = [sys.executable, "-m", "specforge_exp.generation.local.serve", "--model", str(TARGET)]
    command += ["--port", "0", "--concurrency", str(concurrency), "--threads", "1", *options]
    process = subprocess.Popen(command, env=ALONE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "listening on" in line:
                yield line.split()[-1] + "/v1"
                break
        else:
            raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait()


class Asked:
    """An engine whose answers have the lengths that are wanted, whatever the model says."""

    def __init__(self, engine: OpenAIEngine, lengths: Lengths) -> None:
        self.engine, self.lengths = engine, lengths
        self.servers = engine.servers
        self.tokens = self.cached = 0

    async def answer(self, request: Request) -> Answer:
        """See `generation.engine.Engine`."""
        most = self.lengths[request.session.partition("/")[0]]
        sampling = Sampling(max_tokens=most, ignore_eos=True)
        answer = await self.engine.answer(replace(request, sampling=sampling))
        self.tokens += answer.completion_tokens
        self.cached += answer.cached_tokens
        return answer

    async def close(self) -> None:
        """See `generation.engine.Engine`."""
        await self.engine.close()


def ours(urls: list[str], source: Path, lengths: Lengths, concurrency: int) -> dict[str, Any]:
    """One regeneration of the file as `regen.py` does it."""
    cfg = Config(
        run_name="bench", model=ModelConfig(name="tiny", path=str(TARGET)),
        data=DataConfig(name="bench"), loss=LossConfig(name="b", lambda_ce=1.0),
        draft=Eagle3Config(name="d"),
        engine=EngineConfig(name="openai", urls=urls, concurrency=concurrency),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, Interrupt() as interrupt:
        began = time.perf_counter()
        store = make_store(Path(folder), source, chunk_size=64)

        async def whole() -> Asked:
            engine = Asked(OpenAIEngine(cfg, urls), lengths)
            job = Regeneration(store, engine, rules(), RateLimit(None), Progress(store, interrupt))
            await answer_missing(job, concurrency, 1.0)
            return engine

        engine = asyncio.run(whole())
        with (Path(folder) / "d").open("wb") as done, (Path(folder) / "f").open("wb") as failed:
            store.merge(store.plans[0], done, failed)
        seconds = time.perf_counter() - began
        assert store.counts.done == len(lengths), store.counts
        store.close()
    return {"seconds": seconds, "tokens": engine.tokens, "cached": engine.cached}


def scheme(urls: list[str], source: Path, lengths: Lengths, concurrency: int) -> dict[str, Any]:
    """The same file by SpecForge's scheme."""
    began = time.perf_counter()
    tokens = cached = 0

    def converse(url: str, record: dict[str, Any]) -> dict[str, Any]:
        with httpx.Client(timeout=600) as client:
            body = {
                "model": "tiny_target", "messages": record["conversations"], "temperature": 0.0,
                "max_tokens": lengths[record["id"]], "ignore_eos": True,
            }  # fmt: skip
            answer = client.post(f"{url}/chat/completions", json=body).raise_for_status().json()
        record["conversations"].append(answer["choices"][0]["message"])
        return {"record": record, "usage": answer["usage"]}

    waiting: dict[str, list[Future[dict[str, Any]]]] = {url: [] for url in urls}
    with (
        tempfile.TemporaryFile("w") as output,
        ThreadPoolExecutor(concurrency * len(urls)) as pool,
        source.open() as lines,
    ):

        def collect(url: str) -> None:
            nonlocal tokens, cached
            for future in [f for f in waiting[url] if f.done()]:
                result = future.result()
                output.write(json.dumps(result["record"]) + "\n")
                tokens += result["usage"]["completion_tokens"]
                cached += result["usage"]["prompt_tokens_details"]["cached_tokens"]
                waiting[url].remove(future)

        turn = 0
        for line in lines:
            while len(waiting[urls[turn % len(urls)]]) >= concurrency:
                collect(urls[turn % len(urls)])
                turn += 1
                time.sleep(0.001)  # its loop does not sleep; with two cores that would cost it
            url = urls[turn % len(urls)]
            waiting[url].append(pool.submit(converse, url, json.loads(line)))
            turn += 1
        while any(waiting.values()):
            for url in urls:
                collect(url)
            time.sleep(0.001)
    return {"seconds": time.perf_counter() - began, "tokens": tokens, "cached": cached}


OFFLINE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
path, source, size, new = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
model.generation_config.eos_token_id = None
prompts = [json.loads(line)["conversations"] for line in open(source)]
def answer(batch):
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, padding=True)
    inputs = tokenizer.apply_chat_template(batch, return_tensors="pt", **options)
    return model.generate(
        **inputs, max_new_tokens=new, do_sample=False
    )[:, inputs["input_ids"].shape[1]:]
with torch.no_grad():
    answer(prompts[:2])
    began, tokens = time.perf_counter(), 0
    for start in range(0, len(prompts), size):
        tokens += answer(prompts[start : start + size]).numel()
print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}))
"""


def offline(source: Path, size: int, new: int) -> dict[str, Any]:
    """The same prompts in full batches, in a process of its own."""
    command = [sys.executable, "-c", OFFLINE, str(TARGET), str(source), str(size), str(new)]
    done = subprocess.run(command, env=ALONE, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rate(runs: list[dict[str, Any]], case: str, who: str) -> float:
    """Median of tokens per second."""
    chosen = [r for r in runs if r["case"] == case and r["who"] == who]
    return float(statistics.median(r["tokens"] / r["seconds"] for r in chosen))


def measure(runs: list[dict[str, Any]], case: str, who: str, found: dict[str, Any]) -> None:
    """Keep and print one measurement."""
    runs.append({"case": case, "who": who, **found})
    print(
        f"{case:8} {who:9} {found['seconds']:7.2f} s {found['tokens'] / found['seconds']:8.0f} "
        f"tokens/s {found.get('cached', 0):8} cached", file=sys.stderr,
    )  # fmt: skip


def servers(count: int, concurrency: int, stack: ExitStack, *options: str) -> list[str]:
    """Some servers, stopped with the stack."""
    return [stack.enter_context(server(concurrency, *options)) for _ in range(count)]


def compare(folder: Path, times: int, concurrency: int) -> list[dict[str, Any]]:
    """The three cases with servers."""
    runs: list[dict[str, Any]] = []
    equal = write(folder / "equal.jsonl", [text(n, 12) for n in range(4 * concurrency)])
    even = {str(n): 128 for n in range(4 * concurrency)}
    draw = random.Random(0)
    mixed = write(folder / "mixed.jsonl", [text(n, 12) for n in range(3 * concurrency)])
    lengths = {str(n): draw.randint(16, 1024) for n in range(3 * concurrency)}
    beginnings = [text(-n, 250) for n in range(1, 21)]
    order = draw.choices(beginnings, k=400)
    shared = write(folder / "shared.jsonl", [b + text(n, 5) for n, b in enumerate(order)])
    short = {str(n): 8 for n in range(400)}
    for _ in range(times):
        measure(runs, "equal", "offline", offline(equal, concurrency, 128))
        with ExitStack() as stack:
            urls = servers(1, concurrency, stack)
            measure(runs, "equal", "ours", ours(urls, equal, even, concurrency))
            measure(runs, "mixed", "specforge", scheme(urls, mixed, lengths, concurrency))
            measure(runs, "mixed", "ours", ours(urls, mixed, lengths, concurrency))
        for who, client in (("specforge", scheme), ("ours", ours)):
            with ExitStack() as stack:
                urls = servers(2, 8, stack, "--cache-mb", "24")
                measure(runs, "shared", who, client(urls, shared, short, 8))
    return runs


def client(folder: Path, records: int) -> dict[str, float]:
    """`regen_client.py`: all records, then a start with nine tenths of them done."""
    found: dict[str, float] = {}
    for step in ("make", "whole", "resume"):
        command = [sys.executable, str(HERE / "regen_client.py"), step, str(folder), str(records)]
        done = subprocess.run(command, env=ALONE, stdout=subprocess.PIPE, text=True, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])
        print(f"client   {step}: {done.stdout.splitlines()[-1]}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--runs", type=int, default=3, help="runs each way")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--records", type=int, default=1_000_000, help="of the client's test")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = compare(Path(folder), args.runs, args.concurrency)
        client_figures = client(Path(folder), args.records)
    result = {
        "vs_offline_batch": rate(runs, "equal", "ours") / rate(runs, "equal", "offline"),
        "vs_specforge_scheme": rate(runs, "mixed", "ours") / rate(runs, "mixed", "specforge"),
        "vs_specforge_scheme_shared": (
            rate(runs, "shared", "ours") / rate(runs, "shared", "specforge")
        ),
        **client_figures,
    }
    rounded = {name: round(value, 3) for name, value in result.items()}
    if args.json:
        print(json.dumps({**rounded, "concurrency": args.concurrency, "runs": runs}))
    else:
        for name, value in rounded.items():
            print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
