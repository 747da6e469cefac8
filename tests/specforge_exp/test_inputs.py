"""Jobs of -m whose inputs are missing: one message before one starts, its commands in order."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import REPOSITORY, TINY
from omegaconf import OmegaConf
from test_checks import changed

from specforge_exp import paths
from specforge_exp.artifacts import read_record
from specforge_exp.config import Config, Source
from specforge_exp.errors import InputError
from specforge_exp.inputs import check_jobs, require
from specforge_exp.records import write_record

SMALL = ["model=tiny", "experiment=quickstart"]


def job(folder: Path, **options: object) -> object:
    """A composed configuration whose artifacts would lie in `folder`."""
    cfg = OmegaConf.structured(Config)
    roots = {"datasets": str(folder / "d"), "checkpoints": str(folder / "c")}
    given = {
        "run_name": "r", "model": {"name": "tiny", "path": TINY.path}, "paths": roots,
        "data": {"name": "one", "train": [{"path": "synthetic:train", "limit": 2}]},
        "loss": {"name": "l", "lambda_ce": 1.0},
        "draft": {"_target_": "specforge_exp.drafts.eagle3.Eagle3", "name": "eagle3"},
    }  # fmt: skip
    return OmegaConf.merge(cfg, given, options)


def refused(stage: str, jobs: list[object]) -> list[str]:
    """The lines of a refusal; [] of jobs that may start."""
    try:
        check_jobs(stage, jobs)  # type: ignore[arg-type]
    except InputError as error:
        return str(error).splitlines()
    return []


def test_what_is_missing_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "data.name=one,two", "lr=1,2"])
    jobs = [job(tmp_path, lr=lr, data={"name": name}) for name in ("one", "two") for lr in (1, 2)]
    first, *commands, hint = refused("train", jobs)
    assert first.startswith(f"{tmp_path}/d/one--tiny.tokens/index.json and 1 more do not exist")
    assert commands == [
        f"  python {stage}.py -m data.name=one,two" for stage in ("prep", "regen", "preprocess")
    ]
    assert hint == "  # preprocess.source=prep does without regen.py"
    made = tmp_path / "d" / "one--tiny.tokens"
    made.mkdir(parents=True)
    (made / "index.json").write_text("{}")
    assert refused("train", jobs[:2]) == []
    assert refused("train", jobs)[0].startswith(f"{tmp_path}/d/two--tiny.tokens/index.json does")


def test_each_stage_asks_for_its_own(tmp_path: Path, cfg: Config) -> None:
    assert refused("prep", [job(tmp_path)]) == []
    assert "c/r/metrics.jsonl" in refused("export", [job(tmp_path)])[0]
    assert refused("export", [job(tmp_path, export={"source": "a"})]) == []
    assert "d/one/train.jsonl" in refused("regen", [job(tmp_path)])[0]
    assert refused("regen", [job(tmp_path, regen={"dry_run": True})]) == []
    # What is wrong with one job alone is its own failure.
    assert refused("train", [job(tmp_path, lr=-1.0)]) == []
    assert paths.tokens_dir(cfg).name == "small--tiny.tokens"


@pytest.mark.parametrize("more", [["loss=baseline,full-opd"], ["hparams_search=opd"]])
def test_a_sweep_and_a_study_start_nothing(more: list[str], tmp_path: Path) -> None:
    done = warm.run([str(REPOSITORY / "train.py"), "-m", *SMALL, *more], cwd=tmp_path, kind="apps")
    assert done.returncode == 1 and "so no job was started; make it with:" in done.stderr
    assert done.stderr.count("prep.py -m ") == done.stderr.count("regen.py -m ") == 1
    assert "Traceback" not in done.stderr and "#0" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preprocess.last_turn_only": True}, "last_turn_only was false, now true.*preprocess.f"),
        ({"preprocess.thinking": "out"}, "preprocess.thinking was in, now out"),
        ({"model.chat_template_kwargs": {"a": 1}}, "chat_template_kwargs was {}, now {a:1}"),
        ({"data.max_turns": 1}, "small was .*data.max_turns was null, now 1.*prep.force=true"),
        ({"data.system": "join"}, "data.system was keep, now join"),
        (
            {"data.train": [Source("synthetic:train/stories", limit=12)]},
            "data.train was .*synthetic:train,.*synthetic:train/stories,",
        ),
    ],
)
def test_options_of_a_stage_before_change_nothing(
    values: dict[str, Any], message: str, cfg: Config, tokens: Path
) -> None:
    """They are refused where they are given later on, also to what reads it by another stage."""
    require(cfg, "preprocess")
    with pytest.raises(InputError, match=message):
        require(changed(cfg, values), "preprocess")
    require(changed(cfg, {"preprocess.processes": 1, "preprocess.shard_tokens": 9}), "preprocess")


def test_options_of_answers(cfg: Config, tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Between prompts and tokens; each by the record that it is known by. regen's own are said."""
    record, answers = read_record(tokens / "run.json"), paths.regen_dir(cfg)
    answers.mkdir()
    (answers / "train.jsonl").write_text("")
    for folder in (answers, tokens):
        record["config"]["preprocess"]["source"] = "regen"
        write_record(folder / "run.json", record | {"files": {}})
    cfg.preprocess.source = "regen"
    for stage in ("regen", "preprocess"):
        with pytest.raises(InputError, match=r"data\.sample_size was null, now 2"):
            require(changed(cfg, {"data.sample_size": 2}), stage)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            require(changed(cfg, {"regen.top_k": 3, "regen.temperature": 0.0}), stage)
        assert "made with regen.temperature=0.7, regen.top_k=null, which is not" in caplog.text


def test_options_that_are_left_out_are_said(
    cfg: Config, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And what has been made again since."""
    record = read_record(tokens / "run.json")
    record["config"]["preprocess"]["overlong"] = "drop"
    write_record(tokens / "run.json", record)
    with caplog.at_level(logging.INFO):
        require(cfg, "preprocess")
    assert f"{tokens} was made with preprocess.overlong=drop, which is not given" in caplog.text
    assert "by now" not in caplog.text
    part = [replace(source, limit=3) for source in cfg.data.train]
    with caplog.at_level(logging.INFO):
        require(changed(cfg, {"data.train": part, "preprocess.overlong": "drop"}), "preprocess")
    assert "was made with data.train=" in caplog.text
    prompts = read_record(paths.prompts_dir(cfg) / "run.json")
    prompts["files"]["train.jsonl"]["sha256"] = "other"
    write_record(paths.prompts_dir(cfg) / "run.json", prompts)
    require(changed(cfg, {"preprocess.overlong": "drop", "data.max_turns": 1}), "preprocess")
    assert "small is another by now than what was made of it" in caplog.text
