"""A real vLLM server on this machine's CPU with a draft of ours: `make engines` sets it up.

Nothing here is of our making but the draft: the server loads the export as it is, and its answers
and its own counts have to be those of bench in this process.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from conftest import TINY
from test_bench_served import EXACT, figures, trained  # noqa: F401
from test_sglang_engine import free_port
from test_zlab import exported as dflash  # noqa: F401

from specforge_exp import paths
from specforge_exp.config import Config, EngineConfig
from specforge_exp.stages.bench import bench
from specforge_exp.stages.prep import prep
from specforge_exp.stages.regen import regen

pytestmark = pytest.mark.engines

PYTHON = os.environ.get("SPECFORGE_VLLM_PYTHON", "")
"""The interpreter that has vLLM; runs/engines.sh names it."""
Serve = Callable[..., tuple[str, Path]]
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
    """Starts a server, waits until it is healthy; its address and its log."""
    assert PYTHON, "SPECFORGE_VLLM_PYTHON is not set: run this with `make engines ENGINES=1`"
    started: list[subprocess.Popen[bytes]] = []
    folder = tmp_path_factory.mktemp("vllm")

    def start(*more: str) -> tuple[str, Path]:
        port, log = free_port(), folder / f"vllm-{len(started)}.log"
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", TINY.path]
        command += [*OPTIONS, "--served-model-name", "tiny", "--port", str(port), *more]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=clean, start_new_session=True, cwd=folder
            )
        started.append(process)
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTS
        while not healthy(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)
        return url, log

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
    for process in started:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def alone(serve: Serve) -> str:
    """The address of a server of the target alone."""
    return serve()[0]


def speculating(serve: Serve, method: str, cfg: Config) -> tuple[str, Path]:
    """A server with the export as it is."""
    speculation = {
        "method": method, "model": str(paths.export_dir(cfg)),
        "num_speculative_tokens": cfg.chain_length,
    }  # fmt: skip
    return serve("--speculative-config", json.dumps(speculation))


def measured(cfg: Config, url: str, alone: str) -> dict[str, Any]:
    """What `bench.py engine=openai` says of both servers; every answer is the target's own."""
    engine = EngineConfig(name="openai", urls=[f"{url}/v1"], served_name="tiny")
    asked = replace(cfg, engine=engine, bench=replace(cfg.bench, alone_url=alone))
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
def eagle3(trained: Config, serve: Serve) -> tuple[str, Path]:  # noqa: F811
    return speculating(serve, "eagle3", trained)


def test_eagle3_on_vllm(
    trained: Config,  # noqa: F811
    eagle3: tuple[str, Path],
    alone: str,
) -> None:
    """Loaded unedited, lossless, and tau and every count of each prompt as in this process."""
    bench(trained)
    expected = figures(trained)
    assert expected["stories"]["accepted_length"] > 1.2
    url, log = eagle3
    same(measured(trained, url, alone), expected)
    said = log.read_text()
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
    eagle3: tuple[str, Path],
    alone: str,
    tmp_path: Path,
) -> None:
    """Two servers, several conversations at a time: the answers of engine=transformers."""
    ours = regenerated(trained, tmp_path / "here", EngineConfig(name="transformers"))
    urls = [f"{eagle3[0]}/v1", f"{alone}/v1"]
    engine = EngineConfig(name="openai", urls=urls, served_name="tiny", concurrency=4)
    assert regenerated(trained, tmp_path / "there", engine) == ours
    assert len(ours) == 24


NORM = """
import torch, vllm
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
current_platform.import_kernels()
torch.manual_seed(0)
key, weight = torch.randn(3, 7, 2, 32), torch.rand(3, 32) + 0.5
found = torch.empty_like(key)
ops.rms_norm(found, key, weight, 1e-6)
normed = key * torch.rsqrt(key.pow(2).mean(-1, keepdim=True) + 1e-6)
right = normed * weight[:, None, None]
print("differs" if (found - right).abs().max() > 1e-3 else "right")
"""
"""A norm of several layers' keys at once, each with its own weight: what vLLM's DFlash asks for."""


def test_dflash_on_vllm(dflash: Config, serve: Serve, alone: str) -> None:  # noqa: F811
    """Loaded unedited and lossless. vLLM 0.32's norm on a CPU takes the first layer's weight for
    all layers, so its drafts and tau are others; where the norm is right, tau has to be ours."""
    expected = figures(dflash)
    url, log = speculating(serve, "dflash", dflash)
    found = measured(dflash, url, alone)
    assert "DFlash" in log.read_text()
    done = subprocess.run(
        [PYTHON, "-c", NORM], env=os.environ | ENVIRONMENT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    if done.stdout.split()[-1] == "right":
        same(found, expected)
    for name, whole in expected.items():
        assert found[name]["tokens"] == whole["tokens"]
        assert found[name]["accepted_length"] > 1
