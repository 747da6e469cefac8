"""A draft that the package does not know: a folder and one YAML file, and every stage takes it."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import warm
from conftest import REPOSITORY, composed
from test_train import metrics

from specforge_exp import paths
from specforge_exp.config import (
    Config,
    DraftConfig,
    TrainerConfig,
    draft_config_class,
    from_omegaconf,
)
from specforge_exp.config.own_code import own_files
from specforge_exp.errors import InputError
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.train import train

FOLDER = REPOSITORY / "tests" / "toy_draft" / "conf"


def toy(*overrides: str) -> DraftConfig:
    own = [f"hydra.searchpath=[{FOLDER}]", "draft=toy", *overrides]
    return from_omegaconf(composed(*own)).draft


def test_its_options_are_its_own() -> None:
    draft = toy("draft.heads=3", "draft.draft_vocab_size=9")
    assert type(draft) is draft_config_class("toy_draft.Toy")
    assert (draft.steps, draft.matters()) == (3, asdict(draft))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "draft.head=3",
            "draft.head is not an option (did you mean draft.heads?). Valid",
        ),
        ("+draft.ttt_length=3", "draft.ttt_length is not an option"),
        ("draft.heads=many", "draft.heads: Value 'many'"),
        ("max_length=3", "draft.heads=2; it needs 4 tokens"),
        ("model.aux_layers=[1,2]", "draft=toy is fed by 1"),
        ("draft._target_=toy_draft.Other", "toy_draft.config.OtherConfig"),
        ("draft._target_=specforge_exp.losses.opd", "losses.config.opdConfig"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        toy(override)
    assert words in str(caught.value)


def test_the_command_line_finds_it_in_a_folder_of_ones_own() -> None:
    command = ["train.py", "--config-dir", str(FOLDER), "draft=toy", "draft.head=3"]
    done = warm.run(command, env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1])})
    assert done.returncode == 1 and "did you mean draft.heads?" in done.stderr


def test_every_stage_takes_it(cfg: Config, tokens: Path) -> None:
    cfg.draft, cfg.max_steps = toy("draft.draft_vocab_size=512"), 2
    cfg.trainer = TrainerConfig(batch_size=6, log_every=1, eval_every=99, save_every=99)
    cfg.bench = replace(cfg.bench, max_tokens=6, bootstrap=20)
    train(cfg)
    first, second, evaluation = metrics(cfg)
    assert 0 < second["loss"] < first["loss"] and "eval/alpha/1" in evaluation
    export(cfg)
    assert bench(cfg) >= 1
    result = json.loads(paths.bench_file(cfg).read_text())
    assert all(figures["lossless"] for figures in result["datasets"].values())
    assert result["settings"]["chain_length"] == 2
    records = [paths.run_dir(cfg) / "run.json", paths.export_dir(cfg) / "run.json"]
    made_of = [json.loads(file.read_text())["inputs"] for file in records] + [result["inputs"]]
    assert len({inputs["the code of toy_draft.Toy"] for inputs in made_of}) == 1
    assert "config.py" in {file.name for file in own_files(cfg.draft._target_)}


def test_options_load_no_torch() -> None:
    code = (
        "import sys; from specforge_exp.config import draft_config_class\n"
        "for target in ('eagle3.Eagle3', 'dflash.DFlash'):\n"
        "    draft_config_class(f'specforge_exp.drafts.{target}')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
