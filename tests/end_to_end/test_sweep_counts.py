"""How many runs a command makes, what they are called: the real command's own dry run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import REPOSITORY, composed
from hydra.core.config_store import ConfigStore

from specforge_exp.config import Config

ConfigStore.instance().store(name="schema", node=Config)


def dry_run(*overrides: str, script: str = "train.py") -> subprocess.CompletedProcess[str]:
    return warm.run([script, "-m", *overrides, "hydra.sweeper.dry_run=true"], kind="apps")


def planned(*overrides: str, script: str = "train.py") -> list[list[str]]:
    """The lines of a dry run's table, as columns: overrides with spaces in their column."""
    done = dry_run(*overrides, script=script)
    assert done.returncode == 0, done.stderr
    header, *lines, last = done.stdout.splitlines()
    assert last == f"{len(lines)} runs"
    columns = [header.index(word) for word in ("run", "overrides", "name", "folder")]
    ends = [*columns[1:], None]
    return [[line[at:end].strip() for at, end in zip(columns, ends, strict=True)] for line in lines]


CASES = ["loss=baseline lr=1e-4", "loss=full-opd lr=5e-5"]


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["loss=glob(*)"], 4),
        (["loss=glob(*)", "lr_point=low,mid,high"], 12),
        (["experiment=ablations"], 12),
        (["experiment=ablations", "model=smollm2_135m"], 12),
        (["experiment=quickstart_ablations"], 12),
        ([f"hydra.sweeper.cases={json.dumps(CASES)}"], 2),
        ([f"hydra.sweeper.cases={json.dumps(CASES)}", "draft.ttt_length=3,5"], 4),
        (["loss=full-opd", "lr=3e-5,5e-5"], 2),
        (["loss=glob(*,exclude=base*)", "lr=3e-5,5e-5"], 6),
        (["loss=full-opd", "seeds=3"], 3),
        (["experiment=smoke", "model=tiny"], 2),
        ([], 1),
    ],
    ids=str,
)
def test_counts(overrides: list[str], count: int) -> None:
    """Every run has a name and a folder of its own."""
    runs = planned(*overrides)
    assert len(runs) == count
    assert len({run[2] for run in runs}) == len({run[3] for run in runs}) == count


def test_no_runs_is_an_error() -> None:
    done = dry_run("experiment=glob(pairs/*)")
    assert done.returncode != 0
    assert "experiment=glob(pairs/*) matches nothing" in done.stderr
    assert "Traceback" not in done.stderr and "runs" not in done.stdout


def test_names_are_the_choices() -> None:
    runs = planned("loss=full-opd", "lr=3e-5,5e-5")
    base = "qwen3_8b_sharegpt_eagle3_full-opd"
    assert [run[2] for run in runs] == [f"{base}_lr3e-05", f"{base}_lr5e-05"]
    folder = f"artifacts/checkpoints/sweeps/qwen3_8b_sharegpt_eagle3/train/{base}_lr3e-05"
    assert runs[0][3] == folder
    names = [run[2] for run in planned("experiment=quickstart_ablations", "loss=mixed")]
    assert names == [f"quickstart_mixed_lr{lr}" for lr in ("0.004", "0.008", "0.016")]


def test_names_never_meet_and_stay() -> None:
    """R29: every run of a sweep has a folder of its own."""
    command = ["loss=mixed", "draft.ttt_length=3,5", "seeds=2"]
    runs = planned(*command)
    base = "qwen3_8b_sharegpt_eagle3_mixed_lr0.0001_ttt_length"
    assert [run[2] for run in runs] == [f"{base}3", f"{base}3_seed1", f"{base}5", f"{base}5_seed1"]
    assert planned(*command) == runs
    with_aux = planned("model.aux_layers=[1,2,3],[2,3,4]", "model=tiny", "run_name=mine")
    assert [run[2] for run in with_aux] == ["mine_aux_layers1-2-3", "mine_aux_layers2-3-4"]


def test_seeds_begin_with_the_configured_one() -> None:
    runs = planned("loss=mixed", "seed=5", "seeds=2")
    assert [run[1].split()[-1] for run in runs[:1]] == ["seed=5"]
    assert runs[1][2].endswith("_seed6")


def test_what_a_stage_returns_and_which_way_it_should_go() -> None:
    wanted = ["objectives=[loss,simulated_length]", "hydra.job.name=train", "model=tiny"]
    options = composed(*wanted, whole=True).hydra.sweeper
    assert (options.names, options.direction) == (
        ["loss", "simulated_length"], ["minimize", "maximize"]
    )  # fmt: skip
    options = composed("hydra.job.name=prep", "model=tiny", whole=True).hydra.sweeper
    assert (options.names, options.direction, options.if_done) == ([], [], "rerun")


@pytest.mark.parametrize(
    ("words", "stage", "direction", "metric"),
    [
        (["hparams_search=opd"], "train", ["maximize"], "eval/simulated_length"),
        (["hparams_search=opd", "objectives=[loss]"], "train", ["minimize"], "eval/loss"),
        (["hparams_search=onpolicy", "objectives=[top1]"], "train", ["maximize"], "eval/top1"),
        (["hparams_search=opd", "objectives=[gpu_hours]"], "train", ["minimize"], None),
        (["hparams_search=opd_cost"], "train", ["maximize", "minimize"], "eval/simulated_length"),
        (["hparams_search=opd_stock", "objectives=[loss]"], "train", ["minimize"], ""),
        (["hydra/sweeper=optuna_async"], "sft", ["minimize"], "eval/loss"),
        (["hydra/sweeper=optuna_async"], "bench", ["maximize"], None),
    ],
)
def test_a_study_goes_the_way_of_what_it_returns(
    words: list[str], stage: str, direction: list[str], metric: str | None
) -> None:
    """Also in what it prunes by: a study of losses looks for the smallest."""
    wanted = [*words, f"hydra.job.name={stage}", "model=tiny"]
    options = composed(*wanted, whole=True).hydra.sweeper
    assert (options.direction, options.get("progress_metric", "")) == (direction, metric)


@pytest.mark.slow
def test_the_stock_sweeper_takes_the_same_options(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "-m", "hydra/sweeper=basic", "loss=full-opd,mixed"]
    tiny = ["model=tiny", f"paths.checkpoints={tmp_path}", f"paths.datasets={tmp_path}"]
    done = subprocess.run(
        [*command, *tiny], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert "python preprocess.py" in done.stderr  # both were composed, and lack their tokens
    assert "loss=mixed" in done.stdout


@pytest.mark.parametrize("script", ["prep.py", "regen.py", "bench.py"])
def test_other_stages(script: str) -> None:
    models = "model=tiny,smollm2_135m"  # both run here, and the command of neither chooses Modal
    assert len(planned(models, "hydra/launcher=basic", script=script)) == 2
