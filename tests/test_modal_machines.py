"""One sweep of real trainings whose models ask for different machines."""

import os
from pathlib import Path

import pytest
from conftest import REPOSITORY
from modal_app import driver
from modal_local.client import LocalModal

# Every name has the weights of the tiny target: no container here has a GPU or a hub.
OPTIONS = ["experiment=smoke", "model.path=${repository:assets/tiny_target}", "device=cpu"]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "asked"),
    [("qwen3_0_6b,qwen3_8b", ["H100:1", "H100:8"]), ("tiny,qwen3_8b", [None, "H100:8"])],
)
def test_each_model_gets_its_machine(
    models: str, asked: list[str | None], datasets: Path, tmp_path: Path,
    on_local_modal: LocalModal, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SPECFORGE_DATASETS", str(datasets))
    monkeypatch.setenv("SPECFORGE_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(REPOSITORY)
    for model in models.split(","):
        for stage in ("prep", "preprocess"):
            if not os.path.exists(datasets / f"smoke--{model}.tokens"):
                driver.run([f"{stage}.py", *OPTIONS, f"model={model}", "preprocess.source=prep"])
    sweep = tmp_path / "sweep"
    flags = ["-m", "hydra/launcher=modal", f"hydra.sweep.dir={sweep}", "loss=baseline"]
    printed = driver.run(["train.py", *flags, *OPTIONS, f"model={models}"])
    assert "2 of 2 jobs completed" in printed
    state = on_local_modal.state()
    calls = [event["call"] for event in driver.events(sweep, "spawn")]
    functions = [state["functions"][state["calls"][call]["function"]] for call in calls]
    assert [function["gpu"] or None for function in functions] == asked
