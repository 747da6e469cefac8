"""What EAGLE-3 became, on a real vLLM server, in both formats: see test_vllm."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_bench_served import figures, trained  # noqa: F401
from vllm_servers import TELLING, Serve, Served, measured, same, same_by_itself

from specforge_exp import paths
from specforge_exp.config import Config, draft_config_class, locate
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.train import train

pytestmark = pytest.mark.engines
pytest_plugins = ("vllm_servers",)

OTHERS: dict[str, dict[str, Any]] = {
    "eagle31": {
        "_target_": "specforge_exp.drafts.eagle3.Eagle3", "num_layers": 2, "fc_norm": True,
        "norm_before_residual": True, "norm_output": True, "sliding_window": 16,
        "draft_vocab_size": None,
    },
    "peagle": {
        "_target_": "specforge_exp.drafts.peagle.PEagle", "num_layers": 2, "num_depths": 5,
        "fc_norm": True, "draft_vocab_size": 512,
    },
}  # fmt: skip
PLAIN = {k: v for k, v in OTHERS["peagle"].items() if k != "fc_norm"}
SPECULATORS = {"eagle31": OTHERS["eagle31"], "peagle-plain": PLAIN}
"""With fc_norm vLLM does not read P-EAGLE in this format."""


def learnt(trained: Config, name: str, own: dict[str, Any]) -> Config:  # noqa: F811
    """A draft of a kind; the same one again where it has been trained."""
    cls = draft_config_class(own["_target_"])
    draft = cls(name=name, **own)
    cfg = replace(trained, run_name=name, epochs=9, draft=draft)
    if draft.draft_vocab_size is None:  # its tokens count no words
        folder = Path(cfg.paths.datasets).with_name(name)
        cfg.paths = replace(cfg.paths, datasets=str(folder))
        if not folder.exists():
            shutil.copytree(trained.paths.datasets, folder)
            preprocess(replace(cfg, preprocess=replace(cfg.preprocess, force=True)))
    train(cfg)
    return cfg


@pytest.mark.parametrize("name", OTHERS)
def test_what_eagle_became_on_vllm(
    trained: Config,  # noqa: F811
    serve: Serve,
    alone: Served,
    name: str,
) -> None:
    """EAGLE-3.1's options with all of the vocabulary, and P-EAGLE by parallel drafting: loaded
    unedited, lossless, and tau and every count of each prompt as in this process."""
    cfg = learnt(trained, name, OTHERS[name])
    export(cfg)
    bench(cfg)
    expected = figures(cfg)
    assert expected["stories"]["accepted_length"] > 1.2
    options = locate(cfg.draft._target_).vllm_options(cfg.chain_length)
    speculation = json.dumps(options | {"model": str(paths.export_dir(cfg))})
    served = serve("--speculative-config", speculation, *TELLING)
    same(measured(cfg, served, alone), expected)
    served.process.terminate()


@pytest.mark.parametrize("name", SPECULATORS)
def test_vllm_starts_a_speculator(
    trained: Config,  # noqa: F811
    serve: Serve,
    alone: Served,
    name: str,
) -> None:
    """Exported in speculators' format, which vLLM starts by itself."""
    same_by_itself(learnt(trained, name, SPECULATORS[name]), serve, alone)
