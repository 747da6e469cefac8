"""One sweep of real trainings whose models ask for different machines."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from holding import IN_EACH, hold, release
from modal_app import driver
from modal_local.client import LocalModal

# Every name has the weights of the tiny target: no container here has a GPU or a hub.
OPTIONS = [
    "experiment=smoke", "model.path=${repository:assets/tiny_target}", "device=cpu",
    "data.name=machines", "run_name=machines_${model.name}",
]  # fmt: skip


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def in_the_repository(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECFORGE_DATASETS", str(datasets))
    monkeypatch.setenv("SPECFORGE_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(REPOSITORY)


def make_tokens(model: str, datasets: Path) -> None:
    for stage in ("prep", "preprocess"):
        if not (datasets / f"machines--{model}.tokens").exists():
            driver.run([f"{stage}.py", *OPTIONS, f"model={model}", "preprocess.source=prep"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "gpus"),
    [("qwen3_0_6b,qwen3_8b", ["H100:1", "H100:8"]), ("tiny,qwen3_8b", [None, "H100:8"])],
)
def test_each_model_gets_its_machine(
    models: str, gpus: list[str | None], datasets: Path, tmp_path: Path,
    on_local_modal: LocalModal,
) -> None:  # fmt: skip
    for model in models.split(","):
        make_tokens(model, datasets)
    sweep = tmp_path / "sweep"
    flags = ["-m", "hydra/launcher=modal", f"hydra.sweep.dir={sweep}", "loss=baseline"]
    printed = driver.run(["train.py", *flags, *OPTIONS, f"model={models}"])
    assert "2 of 2 jobs completed" in printed
    state = on_local_modal.state()
    calls = [event["call"] for event in driver.events(sweep, "spawn")]
    functions = [state["functions"][state["calls"][call]["function"]] for call in calls]
    assert [function["gpu"] or None for function in functions] == gpus


def losses(path: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_a_preempted_training_takes_the_same_steps(
    datasets: Path, tmp_path: Path, held: Path, on_local_modal: LocalModal
) -> None:
    """R30: train.py itself: its losses are those of a run on this machine, to the bit."""
    import modal

    make_tokens("tiny", datasets)
    options = [*OPTIONS, "model=tiny", "loss=mixed", "epochs=4", "max_steps=60", "run_name=same"]
    options += ["trainer.log_every=1", "trainer.save_every=10", "trainer.keep_last=100"]
    sweep = tmp_path / "sweep"
    flags = ["-m", "hydra/launcher=modal", f"hydra.sweep.dir={sweep}", "resources.single_use=true"]
    shutil.copytree(IN_EACH, held / "site")
    holding = [f"+resources.env.PYTHONPATH='{held}/site:/root'"]
    holding += [f"+resources.env.HOLD_FOLDER={held}"]
    hold(held / "same", 50)
    process = driver.start(["train.py", *flags, *options, *holding])

    def far_enough(state: object) -> bool:
        entries = driver.events(sweep, "sweep")
        if not entries or not driver.running(on_local_modal, sweep):
            return False
        running = modal.Dict.from_name(entries[0]["dict"] + "-running", create_if_missing=True)
        return any(status.get("step", 0) >= 5 for status in running.values())

    on_local_modal.wait_for(far_enough)
    [task] = driver.running(on_local_modal, sweep)
    on_local_modal.preempt(task)
    release(held / "same")
    driver.finish(process)
    assert driver.ends(sweep)[0]["attempt"] == 2
    driver.run(["train.py", *options])
    there = losses(sweep / "same" / "metrics.jsonl")
    assert len(there) == 60
    assert there == losses(tmp_path / "same" / "metrics.jsonl")
