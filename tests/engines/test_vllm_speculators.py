"""Exports in speculators' format, which vLLM starts by itself; and DSpark: see test_vllm."""

import json
import os
import subprocess
from dataclasses import replace

import pytest
from test_bench_served import figures, trained  # noqa: F401
from test_vllm import (  # noqa: F401
    ENVIRONMENT,
    OPTIONS,
    PYTHON,
    Serve,
    Served,
    alone,
    measured,
    mended,
    same,
    serve,
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


def test_dspark_on_vllm(trained: Config) -> None:  # noqa: F811
    """vLLM 0.32 has the method and does not start it on a CPU: its model runner needs Triton. When
    this fails, compare what it counts, as test_vllm does."""
    draft = DSparkConfig(name="dspark", num_layers=2, num_features=3, markov_rank=8)
    cfg = replace(trained, run_name="dspark", max_steps=2, draft=draft)
    train(cfg)
    folder = str(export(cfg).resolve())
    speculation = {"method": "dspark", "model": folder, "num_speculative_tokens": 7}
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", cfg.model.path]
    command += [*OPTIONS, "--speculative-config", json.dumps(speculation)]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
    for runner, why in [
        ("0", "Model Runner V2 is required|does not support: dspark"),
        ("1", "Model Runner V2 requires Triton"),
    ]:
        done = subprocess.run(
            command, env=clean | {"VLLM_USE_V2_MODEL_RUNNER": runner}, capture_output=True,
            text=True, check=False, cwd=folder, timeout=600,
        )  # fmt: skip
        assert done.returncode, runner
        assert any(part in done.stderr + done.stdout for part in why.split("|")), done.stderr[-900:]
