"""engine=vllm: servers that bench and regen start and end by themselves; see test_vllm."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from engine_targets import of_vllm
from test_bench_served import figures, trained  # noqa: F401
from test_server_engine import free_port
from vllm_servers import ENVIRONMENT, IN_ONE, PYTHON, STARTS, regenerated, same

from specforge_exp import paths
from specforge_exp.config import Config, EngineConfig
from specforge_exp.drafts.engines import engines
from specforge_exp.stages.bench import bench

pytestmark = pytest.mark.engines
pytest_plugins = ("vllm_servers",)


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


def in_one(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of a process less, as those that tests start; regen's are as they are."""
    cfg.engine.args["distributed_executor_backend"] = "uni"
    for name, value in IN_ONE.items():
        monkeypatch.setenv(name, value)


def test_bench_starts_vllm(
    trained: Config,  # noqa: F811
    by_itself: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four conversations at a time: every count of every prompt is that of this process."""
    in_one(by_itself, monkeypatch)
    bench(trained)
    bench(by_itself)
    assert paths.bench_file(by_itself).name == "bench-vllm.json"
    same(figures(by_itself), figures(trained))
    assert all(data_set["lossless"] is True for data_set in figures(by_itself).values())


def test_regen_starts_vllm(
    trained: Config,  # noqa: F811
    by_itself: Config,
    tmp_path: Path,
) -> None:
    """Its servers read the target's own generation config, and so do we."""
    ours = regenerated(trained, tmp_path / "here", EngineConfig(name="transformers"))
    del by_itself.engine.args["generation_config"]
    assert regenerated(trained, tmp_path / "there", by_itself.engine) == ours


def test_the_targets_that_it_reads_for_a_draft() -> None:
    """What train and regen warn by is what its sources say."""
    (folder,) = Path(PYTHON).parents[1].glob("lib/*/*-packages/vllm")
    (entry,) = [entry for entry in engines() if entry["engine"].startswith("vLLM")]
    found = of_vllm(folder)["not"]
    assert entry["not"] == found and "Gemma3ForCausalLM" in found
