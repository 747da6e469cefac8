"""Exports in speculators' format, which vLLM starts by itself; and DSpark: see test_vllm."""

from dataclasses import replace

import pytest
from mending import TRITON
from test_bench_served import figures, trained  # noqa: F401
from test_vllm import (  # noqa: F401
    Serve,
    Served,
    alone,
    measured,
    mended,
    reproduced,
    same,
    serve,
    speculating,
)
from test_vllm_eagle import OTHERS
from test_zlab import exported as dflash  # noqa: F401

from specforge_exp import paths
from specforge_exp.config import Config, draft_config_class
from specforge_exp.drafts.dspark.config import DSparkConfig
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.train import train

pytestmark = pytest.mark.engines

PEAGLE = {k: v for k, v in OTHERS["peagle"].items() if k != "fc_norm"}
KINDS = {**OTHERS, "peagle": PEAGLE}
"""With fc_norm vLLM does not read P-EAGLE in this format."""
OF_DFLASH = ("_target_", "name", "sample_from_anchor")
"""What DSpark has of its own."""


def same_by_itself(cfg: Config, serve: Serve, alone: Served, **environment: str) -> None:  # noqa: F811
    """Exported in speculators' format and given to vLLM as the model: lossless, and tau and every
    count of each prompt as in this process."""
    cfg.export = replace(cfg.export, format="speculators", force=True)
    cfg.bench = replace(cfg.bench, force=True)
    export(cfg)
    bench(cfg)
    expected = figures(cfg)
    assert expected["stories"]["accepted_length"] > 1.2
    folder = str(paths.export_dir(cfg))
    same(measured(cfg, serve("--model", folder, **environment), alone), expected)


@pytest.mark.parametrize("name", KINDS)
def test_vllm_starts_a_speculator(
    trained: Config,  # noqa: F811
    serve: Serve,  # noqa: F811
    alone: Served,  # noqa: F811
    name: str,
) -> None:
    own = dict(KINDS[name])
    cls = draft_config_class(own["_target_"])
    draft = cls(name=name, draft_vocab_size=512, **own)
    cfg = replace(trained, run_name=f"by-itself-{name}", epochs=9, draft=draft)
    train(cfg)
    same_by_itself(cfg, serve, alone)


def test_vllm_starts_a_dflash_speculator(
    dflash: Config,  # noqa: F811
    serve: Serve,  # noqa: F811
    alone: Served,  # noqa: F811
    mended: dict[str, str],  # noqa: F811
) -> None:
    """With its norm mended: see test_vllm."""
    same_by_itself(replace(dflash), serve, alone, **mended)


def test_dspark_on_vllm(
    dflash: Config,  # noqa: F811
    serve: Serve,  # noqa: F811
    alone: Served,  # noqa: F811
    mended: dict[str, str],  # noqa: F811
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
    served = speculating(serve, "dspark", cfg, **environment)
    same(measured(cfg, served, alone), figures(cfg))
    assert "Qwen3DSparkModel" in served.log.read_text()
    served.process.terminate()
    same_by_itself(cfg, serve, alone, **environment)
