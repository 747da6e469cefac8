"""What is edited while a sweep runs changes none of its jobs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from conftest import CONF
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hydra_sweeps.errors import SweepError
from hydra_sweeps.reading import read_once
from specforge_exp.config import Config
from tests.study_app.here import STUDY, composed

GRID = ["hydra/sweeper=experiment", "hydra.sweeper.name_key=run_name", "beta=0.25,0.5,0.75"]
POINTS = [*STUDY, "beta=interval(0.0,1.0)", "hydra.sweeper.n_trials=3"]


@pytest.fixture(autouse=True)
def fresh_hydra(hydra_restore_singletons: Any) -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def edits(cfg: DictConfig) -> float:
    """A job whose user thinks of something better, and of another file."""
    folder = Path(cfg.edited)
    with (folder / "seen").open("a") as file:
        file.write(f"{cfg.x} {cfg.beta}\n")
    (folder / "mine" / "chosen.yaml").write_text("# @package _global_\nx: 5.0\n")
    (folder / "mine" / "later.yaml").write_text("# @package _global_\nx: 6.0\n")
    return float(cfg.x)


def sweep(folder: Path, task: Callable[[DictConfig], Any], *options: str) -> list[list[str]]:
    """Run one; x and beta of every job that began."""
    context, config = composed(folder / "sweep", f"+edited={folder}", *options)
    sweeper = Plugins.instance().instantiate_sweeper(
        hydra_context=context, task_function=task, config=config
    )
    sweeper.sweep(list(config.hydra.overrides.task))
    return [line.split() for line in (folder / "seen").read_text().splitlines()]


@pytest.mark.parametrize("options", [GRID, [*GRID, "hydra.sweeper.n_jobs=1"], POINTS])
def test_jobs_have_the_files_with_which_their_sweep_began(
    options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "chosen.yaml").write_text("# @package _global_\nx: 3.0\n")
    own = [f"hydra.searchpath=[file://{tmp_path}]", "+mine=chosen"]
    seen = sweep(tmp_path, edits, *options, *own)
    assert [x for x, _ in seen] == ["3.0"] * 3
    assert len({beta for _, beta in seen}) == 3


def replaces(cfg: DictConfig) -> float:
    """A job beside which somebody prepares the data anew."""
    folder = Path(cfg.edited)
    with (folder / "seen").open("a") as file:
        file.write(f"{cfg.x} {cfg.beta}\n")
    (folder / "prompts").write_text("others")
    return float(cfg.x)


@pytest.mark.parametrize(
    "options", [GRID, *([*kind, "hydra.sweeper.n_jobs=1"] for kind in (GRID, POINTS))]
)
def test_nothing_starts_on_other_inputs(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts").write_text("these")
    inputs = f"hydra.sweeper.inputs=[{tmp_path}/prompts,{tmp_path}/nowhere]"
    with pytest.raises(SweepError) as refused:
        sweep(tmp_path, replaces, *options, inputs)
    assert len((tmp_path / "seen").read_text().splitlines()) == 1
    told = str(refused.value) + capsys.readouterr().out
    assert f"{tmp_path}/prompts has changed since the sweep began" in told
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    done = [run for run in runs if run["status"] == "completed"]
    assert [run["value"] for run in done] == [1.0]


WORDS = [
    ["experiment=quickstart", "loss=mixed", "lr=1e-4"],
    ["experiment=quickstart", "loss=full-opd"],
    ["experiment=dflash_qwen3_8b_wsd", "trainer.batch_size=2", "++hydra.job.name=train"],
    ["experiment=quickstart", "loss=mixed", "lr=2e-4", "++trainer.schedule=wsd", "~naming"],
    ["model=local", "model.path=a", "hydra.searchpath=[file:///nowhere]"],
    ["experiment=quickstart", "loss=mixed", "lr=1e-4"],
]
"""Of some the same files are merged, with other values."""


def about(config: DictConfig) -> dict[str, Any]:
    """What OmegaConf notes of a node: types, flags; not the time that a resolver has told."""
    return {**vars(vars(config)["_metadata"]), "resolver_cache": None}


@pytest.mark.filterwarnings("ignore:provider=")
def test_what_is_remembered_is_what_hydra_makes() -> None:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        plain = [loader.load_configuration("config", words, RunMode.RUN) for words in WORDS]
        loader = read_once(loader)
        for config, words in zip(plain, WORDS, strict=True):
            again = loader.load_configuration("config", words, RunMode.RUN)
            for one, other in ((config, again), (config.trainer, again.trainer)):
                assert OmegaConf.to_yaml(one) == OmegaConf.to_yaml(other)
                assert about(one) == about(other)
            again.trainer.batch_size = 77  # its user's own
            again.hydra.overrides.task.append("x")


def test_elsewhere_nothing_of_it_is_needed() -> None:
    """The loader goes to containers, which have no sweeper."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = GlobalHydra.instance().config_loader()
        loader = read_once(plain)
        loader.load_configuration("config", WORDS[0], RunMode.RUN)
        sent = cloudpickle.dumps(loader)
        assert b"hydra_sweeps.reading" not in sent
        assert type(cloudpickle.loads(sent)) is type(plain) is not type(loader)
