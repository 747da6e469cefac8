"""What EAGLE-3 became, on a real vLLM server: see test_vllm."""

import json
from dataclasses import replace
from typing import Any

import pytest
from test_bench_served import figures, trained  # noqa: F401
from test_vllm import Serve, Served, alone, measured, same, serve  # noqa: F401

from specforge_exp import paths
from specforge_exp.config import Config, draft_config_class, locate
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.train import train

pytestmark = pytest.mark.engines

OTHERS: dict[str, dict[str, Any]] = {
    "eagle31": {
        "_target_": "specforge_exp.drafts.eagle3.Eagle3", "num_layers": 2, "fc_norm": True,
        "norm_before_residual": True, "norm_output": True, "sliding_window": 16,
    },
    "peagle": {
        "_target_": "specforge_exp.drafts.peagle.PEagle", "num_layers": 2, "num_depths": 5,
        "fc_norm": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_eagle_became_on_vllm(
    trained: Config,  # noqa: F811
    serve: Serve,  # noqa: F811
    alone: Served,  # noqa: F811
    name: str,
) -> None:
    """EAGLE-3.1's options, and P-EAGLE by parallel drafting: loaded unedited, lossless, and tau and
    every count of each prompt as in this process."""
    own = dict(OTHERS[name])
    cls = draft_config_class(own["_target_"])
    draft = cls(name=name, draft_vocab_size=512, **own)
    cfg = replace(trained, run_name=name, epochs=9, draft=draft)
    train(cfg)
    export(cfg)
    bench(cfg)
    expected = figures(cfg)
    assert expected["stories"]["accepted_length"] > 1.2
    options = locate(own["_target_"]).vllm_options(cfg.chain_length)
    speculation = json.dumps(options | {"model": str(paths.export_dir(cfg))})
    same(measured(cfg, serve("--speculative-config", speculation), alone), expected)
