"""vLLM servers on this machine's CPU, and what tests ask of them: a plugin of every test file here.

A server of the target alone is one for all files of a process; those with a draft end with their
file. As tests import it before they name it, pytest has it as it is: PYTEST_DONT_REWRITE.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from conftest import TINY
from mending import OVERLAY
from test_bench_served import EXACT, figures
from test_server_engine import free_port

from specforge_exp import paths
from specforge_exp.config import Config, EngineConfig
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.prep import prep
from specforge_exp.stages.regen import regen

PYTHON = os.environ.get("SPECFORGE_VLLM_PYTHON", "")
"""The interpreter that has vLLM; runs/engines.sh names it."""


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


Serve = Callable[..., Served]
STARTS = 900
"""Seconds for a server to be healthy: it compiles nothing, but it loads much."""
OPTIONS = (
    "--host 127.0.0.1 --dtype float32 --max-model-len 1024 --max-num-seqs 8 --enforce-eager "
    "--distributed-executor-backend uni --num-gpu-blocks-override 128"
).split()
"""Of its three processes two: each reads all of vLLM again, which is most of what a start takes.
And 16,384 tokens of keys, not a whole GB."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "",
}  # fmt: skip
IN_ONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Without it vLLM takes a process more on a CPU, whatever its options say."""
TELLING = ("--per-request-spec-decode-metrics", "detailed")
"""What each verification accepted, in order, with each answer: exact on a busy machine, too."""
UNSAID: dict[str, Any] = {"gained": [], "gained_at_least": {"3": None, "5": None}}
"""Where it is not known in which verification an answer ended."""


def healthy(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5):
            return True
    except (URLError, OSError):
        return False


def starting(folder: Path) -> Iterator[Serve]:
    """Starts a server and waits until it is healthy; all of them end with the generator."""
    assert PYTHON, "SPECFORGE_VLLM_PYTHON is not set: run this with `make engines ENGINES=1`"
    started: list[subprocess.Popen[bytes]] = []

    def start(*more: str, **environment: str) -> Served:
        port, log = free_port(), folder / f"vllm-{len(started)}.log"
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", TINY.path]
        command += [*OPTIONS, "--served-model-name", "tiny", "--port", str(port), *more]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
        clean |= IN_ONE | environment
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=clean, start_new_session=True, cwd=folder
            )
        started.append(process)
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTS
        while not healthy(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)
        return Served(url, log, process)

    yield start
    running = [process for process in started if process.poll() is None]
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Servers of one file."""
    yield from starting(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the target alone."""
    for start in starting(tmp_path_factory.mktemp("alone")):
        yield start()


def speculating(serve: Serve, method: str, cfg: Config, *more: str, **environment: str) -> Served:
    """A server with the export as it is."""
    speculation = {
        "method": method, "model": str(paths.export_dir(cfg)),
        "num_speculative_tokens": cfg.chain_length,
    }  # fmt: skip
    return serve("--speculative-config", json.dumps(speculation), *more, **environment)


def measured(cfg: Config, served: Served, alone: Served) -> dict[str, Any]:
    """What `bench.py engine=openai` says of both servers; every answer is the target's own."""
    engine = EngineConfig(name="openai", urls=[f"{served.url}/v1"], served_name="tiny")
    asked = replace(cfg, engine=engine, bench=replace(cfg.bench, alone_url=alone.url))
    bench(asked)
    found = figures(asked)
    assert all(data_set["lossless"] is True for data_set in found.values())
    return found


def regenerated(cfg: Config, folder: Path, engine: EngineConfig) -> list[Any]:
    """The conversations of regen, without who answered and how long it took."""
    cfg = deepcopy(cfg)
    cfg.paths.datasets, cfg.engine = str(folder), engine
    cfg.regen.temperature, cfg.regen.max_tokens, cfg.regen.num_samples = 0.0, 40, 24
    prep(cfg)
    lines = (regen(cfg) / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["conversations"] for line in lines]


def same(found: dict[str, Any], expected: dict[str, Any], unsaid: bool = False) -> None:
    """tau and the counts of each prompt, to rounding; `unsaid`: or what it says of none."""
    for name, whole in expected.items():
        for key in EXACT:
            if not unsaid or found[name][key] != UNSAID.get(key, ...):
                assert found[name][key] == pytest.approx(whole[key]), (name, key)


def same_by_itself(cfg: Config, serve: Serve, alone: Served, **environment: str) -> None:
    """Exported in speculators' format and given to vLLM as the model: lossless, and tau and every
    count of each prompt as in this process."""
    cfg.export = replace(cfg.export, format="speculators", force=True)
    cfg.bench = replace(cfg.bench, force=True)
    export(cfg)
    bench(cfg)
    expected = figures(cfg)
    assert expected["stories"]["accepted_length"] > 1.2
    folder = str(paths.export_dir(cfg))
    served = serve("--model", folder, *TELLING, **environment)
    same(measured(cfg, served, alone), expected)
    served.process.terminate()


@pytest.fixture(scope="session")
def mended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a vLLM whose faults on a CPU are mended."""
    folder = tmp_path_factory.mktemp("overlay")
    (folder / "sitecustomize.py").write_text(OVERLAY)
    return {"PYTHONPATH": str(folder)}


def reproduced(script: str, **environment: str) -> str:
    """Whether an operator of vLLM is right, in a process of its own."""
    done = subprocess.run(
        [PYTHON, "-c", script], env=os.environ | ENVIRONMENT | environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()[-1]
