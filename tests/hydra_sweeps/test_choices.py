"""A swept choice that would have chosen another launcher or sweeper is refused before it runs."""

from pathlib import Path

import pytest
import warm

APP = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    return float(cfg.x)

main()
"""
MODAL = "# @package _global_\ndefaults: [{override /hydra/launcher: modal}]\n"
PARAMS = "# @package _global_\nhydra: {sweeper: {params: {x: 'VALUES'}}}\n"
FILES = {
    "config.yaml": "defaults: [multirun, _self_, {m: a}, {e: null}]\nx: 0\n",
    "multirun.yaml": "defaults: [{override /hydra/sweeper: experiment}]\n",
    "m/a.yaml": "name: a\n",
    "m/b.yaml": MODAL + "m: {name: b}\n",
    "m/c.yaml": MODAL + "m: {name: c}\n",
    "e/none.yaml": "# @package _global_\nx: 1\n",
    "e/slow.yaml": "# @package _global_\nhydra: {launcher: {poll: 7}}\n",
    "e/one.yaml": PARAMS.replace("VALUES", "1,2"),
    "e/two.yaml": PARAMS.replace("VALUES", "3,4"),
}


def run(folder: Path, *overrides: str, dry: bool = True) -> tuple[int, str]:
    """The app with -m; its exit code and what it prints."""
    (folder / "app.py").write_text(APP)
    for name, text in FILES.items():
        path = folder / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    rehearsal = ["hydra.sweeper.dry_run=true"] * dry
    done = warm.run(["app.py", "-m", *overrides, *rehearsal], cwd=folder, together=True)
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["m=a,b,c", "x=1,2"], ["hydra/launcher=modal", "m=a x=1,2", "m=b,c x=1,2"]),
        (["x=1", "e=one,two"], ["hydra.sweeper", "x=1 e=one ", "x=1 e=two "]),
        (["m=b,c"], ["m=b,c hydra.sweeper.dry_run=true hydra/launcher=modal"]),
        (["m=glob(*)"], ["hydra/launcher=basic", "python app.py -m m=a ", "m=b,c "]),
    ],
)
def test_what_was_meant_is_said(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    code, printed = run(tmp_path, *overrides)
    assert code == 1
    assert all(word in printed for word in words)


STUDY = ["hydra/sweeper=optuna_async", "hydra.sweep.subdir=${hydra.job.num}"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["m=a,c", "x=interval(1,2)"], ["hydra/launcher=modal", "m=a ", "m=c "]),
        (["x=interval(1,2)", "m=choice(b,c)"], ["hydra/launcher=modal"]),
    ],
)
def test_a_study_is_refused_too(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    code, printed = run(tmp_path, *STUDY, *overrides)
    assert code == 1 and all(word in printed for word in words), printed


def test_studies_whose_choices_agree(tmp_path: Path) -> None:
    for overrides in (["m=a,c", "hydra/launcher=basic"], ["m=a,missing"], ["x=interval(1,2)"]):
        code, printed = run(tmp_path, *STUDY, *overrides)
        assert code == 0 and "20 runs" in printed, printed


def test_a_point_that_a_study_did_not_announce_is_a_failed_trial(tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text(
        "def more(cfg, t):\n    t.suggest_categorical('m', ['a', 'b'])\n"
    )
    custom = ["hydra.sweeper.custom_search_space=space.more"]
    few = ["hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=4", "+hydra.sweeper.sampler.seed=1"]
    code, printed = run(tmp_path, *STUDY, *custom, "x=1", *few, dry=False)
    assert code == 0 and "chooses hydra/launcher=modal, and this command has" in printed


def test_the_launcher_sees_it_under_any_sweeper(tmp_path: Path) -> None:
    own = ["hydra/sweeper=basic", "hydra/launcher=modal"]
    code, printed = run(tmp_path, *own, "e=none,slow", dry=False)
    assert code == 1 and "job 1 [e=slow] chooses another hydra.launcher" in printed, printed


@pytest.mark.parametrize(
    "overrides",
    [
        "m=a x=1,2",
        "m=b,c hydra/launcher=modal",
        "m=a,b hydra/launcher=basic",
        "e=one",
        "e=one m=a,a",
    ],
)
def test_choices_that_agree(overrides: str, tmp_path: Path) -> None:
    code, printed = run(tmp_path, *overrides.split())
    assert code == 0, printed
