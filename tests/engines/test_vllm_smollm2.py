"""A real target of 135M parameters and prompts that people wrote, on a real vLLM server: see
test_vllm. runs/engines.sh fetches them."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_config
from test_bench_served import figures
from vllm_servers import TELLING, Serve, measured, same

from specforge_exp import paths
from specforge_exp.config import Config, EngineConfig, ModelConfig, Source
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.prep import prep
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.regen import regen
from specforge_exp.stages.train import train

pytestmark = pytest.mark.engines
pytest_plugins = ("vllm_servers",)

PLACE = os.environ.get("SPECFORGE_SMOLLM2", "")
"""The folder of the model and of its prompts."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A draft that has learnt for a minute from the target's own answers."""
    assert PLACE, "SPECFORGE_SMOLLM2 is not set: run this with `make engines ENGINES=1`"
    cfg = make_config(tmp_path_factory.mktemp("smollm2"))
    prompts = Path(PLACE, "prompts")
    cfg.model = ModelConfig(name="smollm2", path=str(Path(PLACE, "smollm2-135m-instruct")))
    cfg.data.train = [Source(path=str(prompts / "chat.jsonl"), limit=24)]
    cfg.data.eval = [Source(path=str(prompts / "chat.jsonl"), skip=320, limit=2)]
    cfg.regen.temperature, cfg.regen.max_tokens = 0.0, 64
    cfg.epochs, cfg.lr, cfg.target.cache = 5, 1.5e-3, "memory"
    cfg.export.dtype, cfg.bench.max_tokens, cfg.bench.bootstrap = "float32", 32, 50
    humaneval = Source(path=str(prompts / "humaneval.jsonl"), format="humaneval", limit=4)
    cfg.bench.datasets = {
        "chat": Source(path=str(prompts / "chat.jsonl"), limit=8),
        "humaneval": humaneval,
    }
    for stage in (prep, regen, preprocess, train, export):
        stage(cfg)
    return cfg


def test_smollm2_on_vllm(smollm2: Config, serve: Serve) -> None:
    """Loaded unedited, lossless, and tau and every count of each prompt as in this process; and
    four prompts at a time."""
    bench(smollm2)
    expected = figures(smollm2)
    assert expected["chat"]["accepted_length"] > 1.1
    model = ("--model", smollm2.model.path)
    export_dir, chain = str(paths.export_dir(smollm2)), smollm2.chain_length
    speculation = {"method": "eagle3", "model": export_dir, "num_speculative_tokens": chain}
    alone = serve(*model)
    served = serve(*model, *TELLING, "--speculative-config", json.dumps(speculation))
    same(measured(smollm2, served, alone), expected)
    engine = EngineConfig(
        name="openai", urls=[f"{served.url}/v1"], served_name="tiny", concurrency=4
    )
    together = replace(smollm2.bench, alone_url=alone.url, concurrency=4, force=True)
    four = replace(smollm2, engine=engine, bench=together)
    bench(four)
    same(figures(four), expected)
    assert "LlamaForCausalLMEagle3" in served.log.read_text()
