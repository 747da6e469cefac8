"""DFlash and DSpark on a real vLLM server, in both formats: see test_vllm."""

from dataclasses import replace

import pytest
from mending import NORM, TRITON
from test_bench_served import figures
from test_zlab import exported as dflash  # noqa: F401
from vllm_servers import (
    TELLING,
    Serve,
    Served,
    measured,
    reproduced,
    same,
    same_by_itself,
    speculating,
)

from specforge_exp.config import Config
from specforge_exp.drafts.dspark.config import DSparkConfig
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.train import train

pytestmark = pytest.mark.engines
pytest_plugins = ("vllm_servers",)

OF_DFLASH = ("_target_", "name", "sample_from_anchor")
"""What DSpark has of its own."""


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
        served = speculating(serve, "dflash", dflash, *TELLING)
        wrong = measured(dflash, served, alone)
        assert all(wrong[name]["tokens"] == whole["tokens"] for name, whole in expected.items())
        served.process.terminate()
        environment = mended
    assert reproduced(NORM, **environment) == "right"
    served = speculating(serve, "dflash", dflash, *TELLING, **environment)
    dflash.bench.force = True
    same(measured(dflash, served, alone), expected)
    assert "DFlash" in served.log.read_text()
    served.process.terminate()


def test_vllm_starts_a_dflash_speculator(
    dflash: Config,  # noqa: F811
    serve: Serve,
    alone: Served,
    mended: dict[str, str],
) -> None:
    """With its norm mended. The export takes the place of the other format's."""
    same_by_itself(replace(dflash), serve, alone, **mended)


def test_dspark_on_vllm(
    dflash: Config,  # noqa: F811
    serve: Serve,
    alone: Served,
    mended: dict[str, str],
) -> None:
    """In both layouts. vLLM's second model runner, which alone has the method, wants Triton: where
    there is none for CPUs, Triton's interpreter runs its kernels. Its norm is DFlash's."""
    shape = {k: v for k, v in vars(dflash.draft).items() if k not in OF_DFLASH}
    draft = DSparkConfig(name="dspark", markov_rank=8, **shape | {"block_size": 5})
    cfg = replace(dflash, run_name="dspark", draft=draft)
    cfg.bench = replace(cfg.bench, max_tokens=48, force=True)
    train(cfg)
    export(cfg)
    bench(cfg)
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    if reproduced(TRITON) == "differs":
        environment |= mended | {"TRITON_INTERPRET": "1"}
    assert reproduced(TRITON, **environment) == "right"
    served = speculating(serve, "dspark", cfg, *TELLING, **environment)
    same(measured(cfg, served, alone), figures(cfg))
    assert "Qwen3DSparkModel" in served.log.read_text()
    served.process.terminate()
    same_by_itself(cfg, serve, alone, **environment)
