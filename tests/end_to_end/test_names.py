"""Names hold what differs: no two shipped recipes meet in a folder that they would make
differently, and where two commands do, the refusal says under which name both are kept."""

import re
import subprocess
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import CONF, SMALL, composed
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from specforge_exp import paths
from specforge_exp.config import REPOSITORY, Config, InputError, from_omegaconf, resolvers
from specforge_exp.config.settings import training_settings
from specforge_exp.stages.train import train

ConfigStore.instance().store(name="schema", node=Config)
EXPERIMENTS = ["", *sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))]
STUDIES = ["", *sorted(path.stem for path in (CONF / "hparams_search").glob("*.yaml"))]


def made_of(cfg: Config) -> dict[Path, Any]:
    """Every folder that a recipe's stages make, and the options that it depends on."""
    model, data = (cfg.model.path, cfg.model.chat_template_kwargs), asdict(cfg.data)
    regen = {k: v for k, v in asdict(cfg.regen).items() if k not in ("force", "status", "dry_run")}
    answers = (model, data, regen, cfg.seed, cfg.max_length)
    tokens = (answers, asdict(cfg.preprocess), cfg.draft.draft_vocab_size)
    return {
        paths.prompts_dir(cfg): data,
        paths.regen_dir(cfg): answers,
        paths.tokens_dir(cfg): tokens,
        paths.features_dir(cfg): (tokens, cfg.draft.features, cfg.model.aux_layers),
        paths.run_dir(cfg): (tokens, training_settings(cfg)),
    }


def test_no_two_recipes_make_one_folder_differently() -> None:
    folders = {
        name: made_of(from_omegaconf(composed(*[f"experiment={name}"] * bool(name))))
        for name in EXPERIMENTS
    }
    for one, other in combinations(folders, 2):
        for folder in folders[one].keys() & folders[other].keys():
            assert folders[one][folder] == folders[other][folder], (one, other, folder)


@pytest.mark.parametrize(
    "experiment",
    ["", *(pytest.param(n, marks=pytest.mark.slow) for n in ("quickstart", "dflash_qwen3_8b"))],
)
def test_no_two_studies_share_a_name(experiment: str) -> None:
    """Of a study of ours the name goes into its runs' names; the stock sweeper's are told apart by
    what is searched, whatever the experiment calls its runs."""
    words = [f"experiment={experiment}"] * bool(experiment)
    sweepers = {
        s: composed(*words, f"hparams_search={s}", whole=True).hydra.sweeper for s in STUDIES[1:]
    }
    names = [sweeper.study_name for name, sweeper in sweepers.items() if name != "opd_stock"]
    assert len({*names}) == len(names) and None not in names
    stock = sweepers["opd_stock"]
    searched = [key for key, value in stock.params.items() if "interval" in str(value)]
    values = {"loss.lambda_ce": 0.25, "loss.lambda_rkl": 0.5, "loss.beta": 0.125, "lr": 2e-5}
    assert sorted(searched) == sorted(values)
    fixed = [f"{key}={value}" for key, value in stock.params.items() if key not in searched]
    trial = composed(*words, "hparams_search=opd_stock", *fixed,
                     *(f"{key}={value}" for key, value in values.items()))  # fmt: skip
    assert all(str(value) in trial.run_name for value in values.values())
    single = {composed(*words, *[f"hparams_search={s}"] * bool(s)).run_name for s in STUDIES}
    assert trial.run_name not in single


@pytest.mark.parametrize("stopped", [False, True], ids=["complete", "interrupted"])
def test_a_clash_is_refused_with_the_name_that_keeps_both(
    cfg: Config, tokens: Path, stopped: bool
) -> None:
    cfg.max_steps = 2
    train(cfg)
    if stopped:
        (paths.run_dir(cfg) / "run.json").unlink()
    for field, value in (("max_steps", 3), ("seed", 4), ("lr", 2e-3), ("epochs", 7)):
        before = vars(cfg)[field]
        vars(cfg)[field] = value
        with pytest.raises(InputError, match=f"run_name={cfg.run_name}_{field}{value}"):
            train(cfg)
        vars(cfg)[field] = before
    cfg.draft.ttt_length -= 1
    cfg.trainer.batch_size = 4
    with pytest.raises(InputError) as refused:
        train(cfg)
    named = re.search(r"run_name=(\S+?),? ", f"{refused.value} ")
    assert named and named[1].endswith(f"_ttt_length{cfg.draft.ttt_length}_batch_size4")
    cfg.run_name = named[1]
    train(cfg)


@pytest.mark.slow
def test_two_trials_of_the_stock_sweeper(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """Two names, two folders; a failed trial is told by the exit code."""
    options = [
        "-m", "experiment=smoke", "model=tiny", "hparams_search=opd_stock", "max_steps=2",
        "data=synthetic", *SMALL, f"model.path={cfg.model.path}",
        f"model.name={cfg.model.name}", f"draft.draft_vocab_size={cfg.draft.draft_vocab_size}",
        f"max_length={cfg.max_length}", f"paths.datasets={cfg.paths.datasets}",
        f"paths.checkpoints={tmp_path}/c", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1",
    ]  # fmt: skip
    command = [str(REPOSITORY / "train.py"), *options]

    def study(*more: str) -> subprocess.CompletedProcess[str]:
        return warm.run([*command, *more])

    done = study()
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "c").glob("opd_stock_*/run.json"))
    assert len(runs) == 2
    for run in runs:
        [kept] = (tmp_path / "c/sweeps").rglob(f"{run.parent.name}/.hydra/train/config.yaml")
        trial = OmegaConf.load(kept)
        assert f"_beta{trial.loss.beta}_lr{trial.lr}" in run.parent.name
    failing = study("data.name=nothing")
    assert failing.returncode == 1 and "Traceback" not in failing.stderr
    assert "nothing--" in failing.stderr


def test_names_of_local_models() -> None:
    """Two tuned models have two, although both folders are called export."""
    paths = ["runs/sft_a/export", "runs/sft_b/export/", "owner/model-7B", "export", "/my model"]
    names = [resolvers.folder_name(path) for path in paths]
    assert names == ["sft_a", "sft_b", "model-7B", "unnamed", "my-model"]
