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
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from test_bench_served import EXACT, exported, figures, trained  # noqa: F401
from test_sglang_engine import free_port

from specforge_exp import paths
from specforge_exp.config import Config, EngineConfig
from specforge_exp.stages.bench import bench

pytestmark = pytest.mark.engines

PYTHON = os.environ.get("SPECFORGE_VLLM_PYTHON", "")
"""The interpreter that has vLLM; runs/engines.sh names it."""
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


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[str, Path]]]:
    """Starts a server, waits until it is healthy; its address and its log."""
    assert PYTHON, "SPECFORGE_VLLM_PYTHON is not set: run this with `make engines ENGINES=1`"
    started: list[subprocess.Popen[bytes]] = []

    def start(model: str, *more: str) -> tuple[str, Path]:
        port, log = free_port(), tmp_path / f"vllm-{len(started)}.log"
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += [*OPTIONS, "--served-model-name", "tiny", "--port", str(port), *more]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=clean, start_new_session=True, cwd=tmp_path
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


def test_eagle3_on_vllm(
    exported: Config,  # noqa: F811
    serve: Callable[..., tuple[str, Path]],
) -> None:
    """Loaded unedited, lossless, and tau and every count of each prompt as in this process."""
    bench(exported)
    expected = figures(exported)
    assert expected["stories"]["accepted_length"] > 1.2
    speculation = {
        "method": "eagle3", "model": str(paths.export_dir(exported)),
        "num_speculative_tokens": exported.chain_length,
    }  # fmt: skip
    url, log = serve(exported.model.path, "--speculative-config", json.dumps(speculation))
    alone, _ = serve(exported.model.path)
    engine = EngineConfig(name="openai", urls=[f"{url}/v1"], served_name="tiny")
    asked = replace(exported, engine=engine, bench=replace(exported.bench, alone_url=alone))
    bench(asked)
    for name, whole in expected.items():
        found = figures(asked)[name]
        assert found["lossless"] is True, name
        for key in EXACT:
            assert found[key] == pytest.approx(whole[key]), (name, key)
    said = log.read_text()
    assert "LlamaForCausalLMEagle3" in said
    assert "auxiliary layers from speculative config: (2, 4, 5)" in said
