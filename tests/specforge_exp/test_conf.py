"""Every option of every config group composes, and what does not fit is refused by name."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args, get_origin

import conftest
import pytest
import warm
from conftest import CONF
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_sweeps.jobs import Job
from specforge_exp import paths
from specforge_exp.config import Config, LossConfig, from_omegaconf, locate
from specforge_exp.config.keys import unknown_key
from specforge_exp.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = sorted(
    (str(path.parent.relative_to(CONF)), path.stem)
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF and path.parent.name != "local"
)
APART = "data model tracker bench loss paths hydra/sweeper", "draft resources", "engine onpolicy"
"""Groups that say nothing of what another of them says: one of each is composed at a time."""
TOGETHER = [row for some in APART for row in zip_longest(
    *([pair for pair in OPTIONS if f"{pair[0]}/".startswith(f"{name}/")] for name in some.split())
)]  # fmt: skip
TOGETHER += [(pair,) for pair in OPTIONS if pair not in {pair for row in TOGETHER for pair in row}]
NEEDED = {
    ("model", "local"): ["model.path=x/y"],
    ("data", "local"): ["data.path=x.jsonl"],
    ("engine", "openai"): ["engine.urls=[http://127.0.0.1:30000/v1]"],
}


def composed(*overrides: str) -> Config:
    """A configuration of one's own."""
    read = tuple(pair for pair in os.environ.items() if pair[0].startswith("SPECFORGE_"))
    return deepcopy(composed_once(read, *overrides))


@cache
def composed_once(environment: tuple[tuple[str, str], ...], *overrides: str) -> Config:
    """Composed once for all tests that have the same environment, as far as conf/ reads it."""
    return from_omegaconf(conftest.composed(*overrides))


def choice(group: str, name: str) -> str:
    """The override that picks an option; options in sub-folders keep the folder in their name."""
    top, *rest = [group] if group.startswith("hydra/") else group.split("/")
    return f"{top}={'/'.join([*rest, name])}"


@pytest.mark.parametrize("options", TOGETHER, ids=str)
def test_every_option_composes(options: tuple[tuple[str, str] | None, ...]) -> None:
    chosen = [pair for pair in options if pair]
    needed = [override for pair in chosen for override in NEEDED.get(pair, [])]
    cfg = composed(*(choice(*pair) for pair in chosen), *needed)
    assert cfg.run_name
    locate(cfg.loss._target_)


def test_all_groups_are_seen() -> None:
    groups = {group.split("/")[0] for group, _ in OPTIONS}
    assert groups >= set("model data loss draft engine tracker paths resources experiment".split())


LOSSES = {
    "baseline": (1.0, 0.0, 0.0, 5e-5, 1e-4, 2e-4),
    "rkl-only": (0.0, 1.0, 0.0, 3e-5, 5e-5, 1e-4),
    "mixed": (0.5, 0.5, 0.0, 5e-5, 1e-4, 2e-4),
    "full-opd": (0.4, 0.5, 0.1, 3e-5, 5e-5, 1e-4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_four_losses(name: str) -> None:
    cfg = composed(f"loss={name}")
    loss: LossConfig = cfg.loss
    low, mid, high = loss.lrs.low, loss.lrs.mid, loss.lrs.high
    assert (loss.lambda_ce, loss.lambda_rkl, loss.beta, low, mid, high) == LOSSES[name]
    assert cfg.lr == mid
    assert composed(f"loss={name}", "lr_point=high").lr == high
    assert composed(f"loss={name}", "lr=3e-5").lr == 3e-5


def test_glob_finds_four_losses() -> None:
    assert sorted(p.stem for p in (CONF / "loss").glob("*.yaml")) == sorted(LOSSES)


def test_seed_defaults() -> None:
    cfg = composed()
    assert cfg.model.path == "Qwen/Qwen3-8B"
    assert (cfg.data.name, cfg.epochs, cfg.max_length, cfg.seed) == ("sharegpt", 10, 2048, 0)
    assert (cfg.draft.ttt_length, cfg.draft.draft_vocab_size) == (7, 32000)
    assert (cfg.regen.temperature, cfg.regen.max_tokens) == (0.7, 4096)
    assert (cfg.trainer.warmup_ratio, cfg.trainer.clip) == (0.015, 0.5)
    assert cfg.trainer.batch_size / cfg.trainer.gpus == 1
    assert cfg.trainer.resume


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("device=gpu", "device=gpu is not valid; choose one of: auto, cpu, cuda"),
        ("lr=-1", "lr=-1.0 must be above 0"),
        ("draft.supervision=x", "inference, specforge, speculators"),
        ("max_length=5", "draft.ttt_length=7"),
        ("lr=1e-3 lr_point=high", "lr_point=high is lr=0.0002 with loss=baseline, and lr=0.001 is"),
        ("data=quickstart data.path=x", "data.path=x is for data=local; the sources of data=quick"),
        ("data=quickstart data.format=gsm8k", "data.format=gsm8k is for data=local"),
        ("export.step=2 export.best=true", "export.step=2 and export.best=true name two"),
        ("data.split_eval=1.5", "data.split_eval"),
        ("run_name=a/b", "run_name"),
        ("data=local data.path=x data.format=chat", "data.format=chat is not valid; choose one of"),
        ("+data.eval=[{path: x, skip: -1}]", "data.eval[0].skip=-1 must be at least 0"),
        ("bench=standard bench.suite.gsm8k.format=x", "bench.suite.gsm8k.format=x is not valid"),
        ("model.aux_layers=[1]", "draft=eagle3 is fed by 3"),
        (
            "+loss.options.lambda_tv=1",
            "loss.options={'lambda_tv': 1} is for a function of",
        ),
        ("loss.lambda_ce=0", "at least one loss weight must be above 0: loss.lambda_ce, loss."),
        ("loss.lambda_rkl=-1", "loss.lambda_rkl=-1.0 must be at least 0"),
    ],
)
def test_wrong_values_are_named(override: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        composed(*re.split(r" (?=\w+[=.])", override))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("draft", "loss", "named"),
    [
        ("supervision=speculators", "extra/lk-lambda", "leave out loss.lambda_lk=1.0:"),
        ("supervision=speculators", "full-opd", "leave out loss.beta=0.1:"),
        ("supervision=specforge", "mixed", "leave out loss.lambda_rkl=0.5:"),
        ("supervision=specforge", "baseline loss._target_=a.loss", "loss._target_=a.loss"),
    ],
)
def test_no_part_of_a_loss_is_left_out(draft: str, loss: str, named: str) -> None:
    """A peer's way to supervise has the peer's own terms alone."""
    with pytest.raises(InputError, match=re.escape(named)):
        composed(f"draft.{draft}", *f"loss={loss}".split())
    composed(f"draft.{draft}", "loss=extra/lk-alpha")


def options(node: object, key: str = "") -> Iterator[tuple[str, object, str]]:
    """Every field of the configuration that is no node: its key, its type and its value."""
    for field in fields(node):  # type: ignore[arg-type]
        value, name = getattr(node, field.name), f"{key}.{field.name}".lstrip(".")
        if is_dataclass(value):
            yield from options(value, name)
        else:
            yield name, field.type, value


def numbers(kind: type) -> list[tuple[str, str]]:
    """Draft, and key of an option that is a number."""
    return [
        (draft, key)
        for draft in ("eagle3", "dflash")
        for key, type_, _ in options(composed(f"draft={draft}"))
        if kind in (type_, *get_args(type_))
        and get_origin(type_) is not list
        and (draft == "eagle3" or key.startswith("draft."))
    ]


def changed(draft: str, key: str, value: object) -> Config:
    """A configuration with another value, checked as when it is made."""

    def replaced(node: Any, names: list[str]) -> Any:
        first, *more = names
        new = replaced(getattr(node, first), more) if more else value
        return replace(node, **{first: new})

    changed: Config = replaced(composed(f"draft={draft}", "lr=1e-4"), key.split("."))
    return changed


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_float_takes_what_is_not_finite(value: str) -> None:
    assert len(numbers(float)) > 25
    for draft, key in numbers(float):
        with pytest.raises(InputError, match=key.rpartition(".")[2]):
            changed(draft, key, float(value))


@pytest.mark.parametrize(
    "override",
    ["+loss.options.a=nan", "+loss.options.a={b:[1,inf]}", "+model.chat_template_kwargs.a=nan"],
)
def test_nor_does_what_is_open(override: str) -> None:
    with pytest.raises(InputError, match="must be a finite number"):
        composed(override, "loss._target_=my.loss")


def test_no_number_is_below_what_there_can_be() -> None:
    """-1 means nothing anywhere; a draft's head of one token has nothing to choose from."""
    assert len(numbers(int)) > 40
    for draft, key in numbers(int) + numbers(float):
        with pytest.raises(InputError, match=key.rpartition(".")[2]):
            changed(draft, key, -1)
    for override in ("draft.draft_vocab_size=1", "seed=-1", "model.aux_layers=[1,2,-3]"):
        with pytest.raises(InputError, match=re.escape(override.partition("=")[0])):
            composed(override)


@pytest.mark.parametrize("key", ["run_name", "sweep_name", "data.name", "model.name", "loss.name"])
def test_no_name_is_a_working_folder(key: str) -> None:
    for name in ("x.partial", "x.old", "x.OLD", "x.tokens", "x.features", ".x", "a/b", "..", ""):
        with pytest.raises(InputError, match=key):
            changed("eagle3", key, name)


def test_names_that_would_be_two() -> None:
    for override in ("data.name=a--b", "draft.name=a.b", "run_name=sweeps"):
        with pytest.raises(InputError, match=override.partition("=")[0]):
            composed(override)
    assert composed("data=local", "data.path=x/my--data.jsonl").data.name == "my-data.jsonl"


NAMES = st.from_regex(r"[ab][-.ab]{0,4}(\.(partial|old|tokens|features|lease))?", fullmatch=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(NAMES, NAMES, NAMES), min_size=2, max_size=2, unique=True))
def test_different_names_are_different_folders(names: list[tuple[str, str, str]]) -> None:
    """And none is one in which another is made, or beside which its lease lies."""
    made: list[set[Path]] = []
    for data, model, draft in names:
        cfg = composed()
        try:
            cfg.data = replace(cfg.data, name=data)
            cfg.model = replace(cfg.model, name=model)
            cfg.draft = replace(cfg.draft, name=draft)
        except InputError:
            return
        folders = {
            *(part(cfg) for part in (paths.prompts_dir, paths.regen_dir, paths.tokens_dir)),
            paths.features_dir(cfg),
        }
        assert len(folders) == 4
        made.append(folders)
    one, other = made
    (data, model, _), (data2, model2, _) = names
    if data != data2 and (model, data) != (model2, data2):
        assert not one & other
    for folder in one:
        beside = {folder.with_name(f"{folder.name}{end}") for end in (".partial", ".old")}
        assert not beside & (one | other)


def run(
    script: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return warm.run([str(ROOT / script), *arguments], env={**os.environ, **(environment or {})})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["loss=nope"], ["baseline", "full-opd", "mixed", "rkl-only"]),
        (["lr=abc"], ["abc", "Float"]),
        (["trainer.clipp=1"], ["did you mean trainer.clip?", "batch_size, accumulate"]),
        (["epoch=1"], ["did you mean epochs?", "max_steps"]),
        (["model=local"], ["model.path"]),
        (["draft.supervision=x"], ["inference", "specforge", "speculators"]),
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    done = run(
        "train.py", *arguments, f"paths.checkpoints={tmp_path}", f"paths.datasets={tmp_path}"
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train.py", ["run_name=../../out/x"], "run_name='../../out/x' may only hold"),
        ("train.py", ["experiment=quickstart"], "/preprocess.py experiment=quickstart\n"),
        ("prep.py", ["data=ultrachat", "prep.check=true"], "/prep.py data=ultrachat\n"),
        ("report.py", ["sweep=."], "holds no sweep.json"),
        ("bench.py", ["experiment=quickstart"], "/train.py experiment=quickstart\n"),
    ],
)
def test_a_refused_call_leaves_nothing(
    tmp_path: Path, script: str, arguments: list[str], words: str
) -> None:
    (tmp_path / "deep" / "in").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    roots = {"SPECFORGE_DATASETS": "data", "SPECFORGE_CHECKPOINTS": "runs"}
    command, cwd = [str(ROOT / script), *arguments], tmp_path / "deep" / "in"
    done = warm.run(command, cwd=cwd, env={**os.environ, **roots})
    assert done.returncode == 1
    assert words in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "in", "out"]
    assert list(tmp_path.glob("deep/in/runs/*")) + list(tmp_path.glob("out/*")) == []


KNOWN = (
    "loss=baseline lr=1 model.chat_template_kwargs.any=1 +new=1 ~loss -m hydra/launcher=basic "
    "experiment=x bench.datasets.a.limit=3 hydra.verbose=true"
).split()


def test_the_home_folder_is_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file of conf/model/, which no shell reads; what a source reads has always been so."""
    monkeypatch.setenv("HOME", "/of/mine")
    cfg = composed("model=local", "model.path='~/target'")
    assert (cfg.model.path, cfg.model.name) == ("/of/mine/target", "target")


def test_known_keys_pass() -> None:
    assert unknown_key(KNOWN, Config) is None
    assert "data.nam is not an option" in (unknown_key([*KNOWN, "data.nam=x"], Config) or "")


@pytest.mark.timing
def test_cfg_job_is_quick() -> None:
    """Half a second of CPU, with a margin of 5."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", "job"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.5


def test_the_limits_of_regeneration_on_modal() -> None:
    cfg = composed("model=qwen3_8b")
    assert (cfg.engine.name, cfg.engine.rate_limit, cfg.engine.timeout) == ("modal", 200, 600)
    assert composed("model=tiny").engine.rate_limit is None


@pytest.mark.parametrize(
    "words", [[], ["experiment=quickstart"], ["experiment=dflash_qwen3_8b_wsd"],
              ["hparams_search=opd"], ["naming=searched"]]
)  # fmt: skip
def test_a_prefix_stands_before_every_name(words: list[str]) -> None:
    plain, cfg = composed(*words), composed(*words, "output_prefix=eagle3-opd_")
    assert cfg.run_name == f"eagle3-opd_{plain.run_name}"
    assert cfg.sweep_name == f"eagle3-opd_{plain.sweep_name}"


def test_large_models_say_their_size() -> None:
    """So that a dry run needs no network."""
    for file in (CONF / "model").glob("*.yaml"):
        if "hydra/launcher: modal" in file.read_text():
            assert composed(f"model={file.stem}").model.billions, file


@pytest.mark.parametrize("name", ["experiment", "optuna_async"])
@pytest.mark.parametrize("init", ["other", "{}/other", "{}/other/step-000003", "other/export"])
def test_a_sweep_knows_what_its_runs_are_made_of(
    name: str, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, weights to begin with, a model, a text or a loss that were made again are others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_loss.py").write_text("import own_parts")
    (tmp_path / "own_parts.py").touch()
    cfg = composed("model=tiny", "data.name=d", f"paths.datasets={tmp_path}")
    words = [f"trainer.init={init.format(tmp_path)}", f"paths.checkpoints={tmp_path}"]
    words += [f"hydra/sweeper={name}", "model=tiny", "data.name=d", f"paths.datasets={tmp_path}"]
    words += [f"model.path={tmp_path}/m", "draft=standalone", f"draft.path={tmp_path}/d"]
    words += [f"pretrain.sources=[{{path: {tmp_path}/a.txt}}, {{path: {tmp_path}/t}}]"]
    words += ["loss._target_=own_loss.mine"]
    job = Job(0, [], conftest.composed(*words, whole=True))
    weights = tmp_path / "other" / init.partition("other/")[2]
    record = weights / ("state.json" if "step" in init else "run.json")
    seen, tokens = {job.digest()}, paths.tokens_dir(cfg) / "run.json"
    names = "m/a", "d/a", "a.txt", "t/b/c.txt", "own_parts.py", "own_loss.py"
    for file in (tokens, record, *map(tmp_path.joinpath, names)):
        file.parent.mkdir(parents=True, exist_ok=True)
        for content in ("made", "made again"):
            file.write_text(content)
            seen.add(job.digest())
    assert len(seen) == 17
