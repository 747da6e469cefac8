"""A real vLLM server on this machine's CPU with a draft of ours: `make engines` sets it up.

Nothing here is of our making but the draft: the server loads the export as it is, and its answers
and its own counts have to be those of bench in this process.
"""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from conftest import TINY
from mending import NORM, OVERLAY, SPREAD
from scipy.stats import chi2_contingency
from test_bench_served import EXACT, figures, trained  # noqa: F401
from test_server_engine import free_port
from test_zlab import exported as dflash  # noqa: F401

from specforge_exp import paths
from specforge_exp.bench import clients
from specforge_exp.bench.asking import asking_of
from specforge_exp.bench.sets import bench_sets
from specforge_exp.bench.speculative import Decoding
from specforge_exp.config import Config, EngineConfig
from specforge_exp.data.conversations import asks_of
from specforge_exp.serving.server import connections
from specforge_exp.stages.bench import bench
from specforge_exp.stages.prep import prep
from specforge_exp.stages.regen import regen
from specforge_exp.target import load_tokenizer

pytestmark = pytest.mark.engines

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
    "--host 127.0.0.1 --dtype float32 --max-model-len 1024 --max-num-seqs 8 --enforce-eager"
).split()
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "",
}  # fmt: skip


def healthy(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5):
            return True
    except (URLError, OSError):
        return False


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts a server and waits until it is healthy."""
    assert PYTHON, "SPECFORGE_VLLM_PYTHON is not set: run this with `make engines ENGINES=1`"
    started: list[subprocess.Popen[bytes]] = []
    folder = tmp_path_factory.mktemp("vllm")

    def start(*more: str, **environment: str) -> Served:
        port, log = free_port(), folder / f"vllm-{len(started)}.log"
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", TINY.path]
        command += [*OPTIONS, "--served-model-name", "tiny", "--port", str(port), *more]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
        clean |= environment
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
def alone(serve: Serve) -> Served:
    """A server of the target alone."""
    return serve()


def speculating(serve: Serve, method: str, cfg: Config, **environment: str) -> Served:
    """A server with the export as it is."""
    speculation = {
        "method": method, "model": str(paths.export_dir(cfg)),
        "num_speculative_tokens": cfg.chain_length,
    }  # fmt: skip
    return serve("--speculative-config", json.dumps(speculation), **environment)


def measured(cfg: Config, served: Served, alone: Served) -> dict[str, Any]:
    """What `bench.py engine=openai` says of both servers; every answer is the target's own."""
    engine = EngineConfig(name="openai", urls=[f"{served.url}/v1"], served_name="tiny")
    asked = replace(cfg, engine=engine, bench=replace(cfg.bench, alone_url=alone.url))
    bench(asked)
    found = figures(asked)
    assert all(data_set["lossless"] is True for data_set in found.values())
    return found


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """tau and the counts of each prompt, to rounding."""
    for name, whole in expected.items():
        for key in EXACT:
            assert found[name][key] == pytest.approx(whole[key]), (name, key)


@pytest.fixture(scope="module")
def eagle3(trained: Config, serve: Serve) -> Served:  # noqa: F811
    return speculating(serve, "eagle3", trained)


def test_eagle3_on_vllm(
    trained: Config,  # noqa: F811
    eagle3: Served,
    alone: Served,
) -> None:
    """Loaded unedited, lossless, and tau and every count of each prompt as in this process."""
    bench(trained)
    expected = figures(trained)
    assert expected["stories"]["accepted_length"] > 1.2
    same(measured(trained, eagle3, alone), expected)
    said = eagle3.log.read_text()
    assert "LlamaForCausalLMEagle3" in said
    assert "auxiliary layers from speculative config: (2, 4, 5)" in said


def regenerated(cfg: Config, folder: Path, engine: EngineConfig) -> list[Any]:
    """The conversations of regen, without who answered and how long it took."""
    cfg = deepcopy(cfg)
    cfg.paths.datasets, cfg.engine = str(folder), engine
    cfg.regen.temperature, cfg.regen.max_tokens, cfg.regen.num_samples = 0.0, 40, 24
    prep(cfg)
    lines = (regen(cfg) / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["conversations"] for line in lines]


def test_regen_on_vllm(
    trained: Config,  # noqa: F811
    eagle3: Served,
    alone: Served,
    tmp_path: Path,
) -> None:
    """Two servers, several conversations at a time: the answers of engine=transformers."""
    ours = regenerated(trained, tmp_path / "here", EngineConfig(name="transformers"))
    urls = [f"{eagle3.url}/v1", f"{alone.url}/v1"]
    engine = EngineConfig(name="openai", urls=urls, served_name="tiny", concurrency=4)
    assert regenerated(trained, tmp_path / "there", engine) == ours
    assert len(ours) == 24


def killed_after_an_answer(process: subprocess.Popen[bytes], log: Path, told: list[int]) -> None:
    """Kill a server as soon as it has answered once."""
    while log.read_text().count("/v1/chat/completions") < 1 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    told.append(process.wait())


def test_one_of_two_servers_is_killed(
    trained: Config,  # noqa: F811
    serve: Serve,
    alone: Served,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """regen says so once and the other does its work: the conversations of an undisturbed one."""
    ours = regenerated(trained, tmp_path / "here", EngineConfig(name="transformers"))
    doomed = serve()
    engine = EngineConfig(
        name="openai", urls=[f"{doomed.url}/v1", f"{alone.url}/v1"], served_name="tiny",
        concurrency=1, patience=2.0,
    )  # fmt: skip
    told: list[int] = []
    killer = Thread(target=killed_after_an_answer, args=(doomed.process, doomed.log, told))
    killer.start()
    assert regenerated(trained, tmp_path / "there", engine) == ours
    killer.join()
    assert told == [-signal.SIGKILL]
    assert caplog.text.count(f"the other servers do the work of {doomed.url}") == 1


@pytest.fixture
def by_itself(
    trained: Config,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Config:
    """engine=vllm: servers that the product starts and ends. What their generation config says
    would change every answer, greedy ones too."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    harmful = {"do_sample": True, "top_k": 1, "repetition_penalty": 1.8, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(harmful))
    args = {
        "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True,
        "generation_config": str(tmp_path),
    }  # fmt: skip
    engine = EngineConfig(
        name="vllm", python=PYTHON, num_servers=1, args=args, port=free_port(),
        startup_timeout=STARTS, concurrency=4,
    )  # fmt: skip
    return replace(trained, engine=engine, bench=replace(trained.bench, concurrency=4))


def test_bench_starts_vllm(trained: Config, by_itself: Config) -> None:  # noqa: F811
    """Four conversations at a time: every count of every prompt is that of this process."""
    bench(trained)
    bench(by_itself)
    assert paths.bench_file(by_itself).name == "bench-vllm.json"
    same(figures(by_itself), figures(trained))
    assert all(data_set["lossless"] is True for data_set in figures(by_itself).values())


def test_regen_starts_vllm(trained: Config, by_itself: Config, tmp_path: Path) -> None:  # noqa: F811
    """Its servers read the target's own generation config, and so do we."""
    ours = regenerated(trained, tmp_path / "here", EngineConfig(name="transformers"))
    del by_itself.engine.args["generation_config"]
    assert regenerated(trained, tmp_path / "there", by_itself.engine) == ours


@pytest.fixture(scope="module")
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


SAMPLES = 400


def test_sampled_answers_are_the_targets_own(
    trained: Config,  # noqa: F811
    eagle3: Served,
    alone: Served,
    serve: Serve,
    mended: dict[str, str],
) -> None:
    """At temperature 1, with the draft, tokens are distributed as those of the target alone; where
    vLLM on a CPU loses the temperature of drafted tokens, this is so once that is mended."""
    if reproduced(SPREAD) == "differs":
        assert reproduced(SPREAD, **mended) == "right"
        eagle3 = speculating(serve, "eagle3", trained, **mended)
    asking = asking_of(trained, load_tokenizer(trained.model), None)
    prompt = asking.encode(asks_of(bench_sets(trained).records["stories"][0])[0])
    decoding = Decoding(3, trained.chain_length, 1.0, frozenset())

    async def answers(url: str) -> Counter[tuple[int, ...]]:
        async with connections(60.0, None) as http:
            client = clients.openai(http, url, "tiny", several=False)
            drawn = [await client(prompt, decoding) for _ in range(SAMPLES)]
        return Counter(tuple(answer.generation.tokens) for answer in drawn)

    counts = [asyncio.run(answers(served.url)) for served in (eagle3, alone)]
    often = [tokens for tokens, count in (counts[0] + counts[1]).items() if count >= 16]
    rows = [[count[tokens] for tokens in often] for count in counts]
    columns = [*zip(*rows, strict=True), tuple(SAMPLES - sum(row) for row in rows)]
    assert len(often) > 2
    assert chi2_contingency([column for column in columns if sum(column)]).pvalue > 1e-3


def test_dflash_on_vllm(
    dflash: Config,  # noqa: F811
    serve: Serve,
    alone: Served,
    mended: dict[str, str],
) -> None:
    """Loaded unedited, lossless, tau and every count as in this process; where vLLM's norm on a
    CPU takes the first layer's weight for all layers, this is so once that is mended."""
    expected = figures(dflash)
    environment: dict[str, str] = {}
    if reproduced(NORM) == "differs":
        served = speculating(serve, "dflash", dflash)
        wrong = measured(dflash, served, alone)
        assert all(wrong[name]["tokens"] == whole["tokens"] for name, whole in expected.items())
        served.process.terminate()
        environment = mended
    assert reproduced(NORM, **environment) == "right"
    served = speculating(serve, "dflash", dflash, **environment)
    dflash.bench.force = True
    same(measured(dflash, served, alone), expected)
    assert "DFlash" in served.log.read_text()
