"""Prefixes are computed once: real servers count what they found in their caches."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from instant_engine import answer_all, make_store, merged
from test_plan import write
from test_serve import serving

from specforge_exp.config import Config
from specforge_exp.generation.engine import Sampling
from specforge_exp.generation.openai_engine import OpenAIEngine

WORKERS, PREFIXES, EACH = 3, 20, 8
ROUTER = "sglang-router==0.3.2"
QUESTIONS = [
    f"{n % PREFIXES:02d} " + "a kettle and a fox. " * 20 + f"Question {n // PREFIXES}"
    for n in range(PREFIXES * EACH)
]
"""The prefixes in turn, so that neighbours in the file share nothing."""


@pytest.fixture
def workers() -> Iterator[list[str]]:
    with ExitStack() as stack:
        options = ("--concurrency", "4", "--threads", "1")
        yield [stack.enter_context(serving(*options))[0] for _ in range(WORKERS)]


def counted(urls: list[str]) -> dict[str, int]:
    """The sum of the workers' counters."""
    found = [json.load(urllib.request.urlopen(f"{url}/metrics", timeout=10)) for url in urls]
    return {name: sum(one[name] for one in found) for name in found[0]}


def share_of_ideal(found: dict[str, int]) -> float:
    """Cached prompt tokens, by what they are when every prefix is computed once.

    A prompt here is its prefix but for a few tokens, and blocks of 16 are cached.
    """
    prompt = found["prompt_tokens"] / len(QUESTIONS)
    ideal = (len(QUESTIONS) - PREFIXES) * (prompt - 16)
    return found["cached_tokens"] / ideal


def regenerate(cfg: Config, folder: Path, urls: list[str]) -> None:
    """All questions through these servers; short answers."""
    store = make_store(folder / "out", write(folder / "a.jsonl", *QUESTIONS), chunk_size=24)
    engine = OpenAIEngine(cfg, [f"{url}/v1" for url in urls])
    answer_all(store, engine, concurrency=4, sampling=Sampling(max_tokens=2))
    assert len(merged(store)[0]) == len(QUESTIONS)


@pytest.mark.timing  # a server that others slow down hands prefixes on
def test_prefixes_are_computed_once(cfg: Config, tmp_path: Path, workers: list[str]) -> None:
    regenerate(cfg, tmp_path, workers)
    assert share_of_ideal(counted(workers)) >= 0.95


@pytest.mark.live
def test_behind_a_router(
    cfg: Config, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, workers: list[str]
) -> None:
    """SGLang's own router, cache_aware, in an environment of its own."""
    venv = tmp_path_factory.mktemp("router")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", ROUTER], check=True)
    command = [python, "-m", "sglang_router.launch_router", "--policy", "cache_aware"]
    port, metrics = free_port(), free_port()
    command += ["--worker-urls", *workers, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(metrics), "--log-level", "warn"]
    router = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: urllib.request.urlopen(f"{url}/health", timeout=5).status == 200)
        cfg.engine.served_name = "tiny_target"
        regenerate(cfg, tmp_path, [url])
    finally:
        router.terminate()
        router.wait()
    assert share_of_ideal(counted(workers)) >= 0.95


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until(ready: Callable[[], bool]) -> None:
    """Return when it is; at most a minute."""
    deadline = time.monotonic() + 60
    while True:
        try:
            if ready():
                return
        except (urllib.error.URLError, OSError):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)
