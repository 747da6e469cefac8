"""The eleven scripts: one shape, quick answers, and what the command line adds to Hydra's own."""

import ast
import gc
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from weakref import ref

import pytest
from conftest import REPOSITORY

from specforge_exp.cli import loaded
from specforge_exp.config import Config
from specforge_exp.config.resolvers import SCRIPTS

TORCHLESS = """
import runpy, sys
sys.argv.pop(0)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = {"torch", "modal", "transformers", "wandb", "datasets", "optuna"} & set(sys.modules)
assert not loaded, loaded
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def cpu(*words: str) -> float:
    """CPU seconds of a command that succeeds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(*words).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def shape(stage: str) -> str:
    """A script's code with its own name replaced."""
    tree = ast.parse((REPOSITORY / f"{stage}.py").read_text())
    assert ast.get_docstring(tree)
    return ast.dump(ast.Module(tree.body[1:], [])).replace(f"stages.{stage}:{stage}", "stages.x:x")


@pytest.mark.parametrize("stage", [stage for stage in SCRIPTS if stage != "bench"])
def test_scripts_are_alike(stage: str) -> None:
    assert shape(stage) == shape("train")


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--help"]])
@pytest.mark.parametrize("stage", ["train", "bench"])
def test_scripts_answer_without_heavy_imports(stage: str, flag: list[str]) -> None:
    done = run("-c", TORCHLESS, f"{stage}.py", *flag)
    assert done.returncode == 0, done.stderr


def test_help_shows_every_group_with_its_options() -> None:
    done = run("train.py", "--help")
    for line in (
        "loss: baseline, full-opd, mixed, rkl-only",
        "loss/extra: dspark, hard-ce, ",
        "epochs: 10",
    ):
        assert f"\n{line}" in done.stdout
    for folder in (REPOSITORY / "conf").iterdir():
        if folder.is_dir() and folder.name not in ("hydra", "local"):
            assert f"\n{folder.name}: " in done.stdout or f"\n{folder.name}/" in done.stdout


@pytest.mark.timing
def test_help_costs_about_what_a_configuration_costs() -> None:
    """Hydra alone copies every option of every plugin once per group: four times as much."""
    composed = min(cpu("train.py", "--cfg", "job") for _ in range(2))
    assert min(cpu("train.py", "--help") for _ in range(2)) < 2 * composed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs", "3"], "unrecognized arguments: --epochs; an option is written epochs=3, in "),
        (["epochs=", "3"], "3: an option is written epochs=3, in one word without dashes"),
        (["data.path=é (1).json"], "data.path=é (1).json: quote it: 'data.path=\"é (1).json\"'"),
    ],
)  # fmt: skip
def test_what_is_no_option_is_answered_with_how_to_write_one(words: list[str], said: str) -> None:
    done = run("train.py", *words)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}"), done.stderr
    if "quote it" in said:
        quoted = run("train.py", *shlex.split(done.stderr.rpartition("it: ")[2]), "--cfg", "job")
        assert f"path: {words[0].partition('=')[2]}" in quoted.stdout, quoted.stderr


def test_a_tilde_is_the_home_folder() -> None:
    """Shells leave it behind `model.path=`, and Hydra's grammar has none."""
    done = run("train.py", "model=local", "model.path=~/x y", "--cfg", "job", "--package", "model")
    assert f"path: {Path.home()}/x y\n" in done.stdout, done.stderr


def test_what_a_terminal_has_no_letter_for_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = run("train.py", "model=local", 'model.path="τ"', "--cfg", "job", "--package", "model")
    assert "path: \\u03c4\n" in done.stdout, done.stderr


def test_streams_that_are_closed(tmp_path: Path) -> None:
    """No file gets the number of one, and whoever reads no more is told in one line."""
    code = "import os, runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0])['main']()"
    code += f"; os.dup(os.open('{tmp_path}/file', os.O_CREAT | os.O_WRONLY)); os.write(2, b'no')"
    words = ["-c", code, "train.py", "--cfg", "job"]
    script = 'exec "$@" <&- >&- 2>&-'
    done = subprocess.run(
        ["bash", "-c", script, "-", sys.executable, *words], cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""
    reader, writer = os.pipe()
    os.close(reader)
    told = subprocess.run(
        [sys.executable, "-u", *words[2:]],
        cwd=REPOSITORY,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (told.returncode, told.stderr) == (1, "error: Broken pipe\n")


def test_status_is_a_word_of_regen() -> None:
    done = run("regen.py", "status", "model=tiny", "--cfg", "job", "--package", "regen")
    assert "status: true" in done.stdout, done.stderr


def test_an_unknown_key_is_answered_with_the_valid_ones() -> None:
    done = run("-m", "specforge_exp", "train", "-m", "epoch=1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: epoch is not an option (did you mean epochs?)")


@pytest.mark.parametrize("words", [["prep.py"], ["train.py", "-m", "loss=baseline,mixed"]])
def test_where_nothing_may_be_written(words: list[str]) -> None:
    """A single call, and a sweep before its first job; nobody makes folders in /sys."""
    places = ["paths.datasets=/sys/here", "paths.checkpoints=/sys/here"]
    done = run(*words, "experiment=quickstart", *places, "hydra.sweeper.precheck=null")
    assert done.returncode == 1
    assert re.fullmatch(r"error: /sys/here[/\w]*: [\w -]+\n", done.stderr)


@pytest.mark.parametrize(
    "words", [["+bench.datasets.mine.path=x"], ["bench.datasets.mine.path=x", "-m"],
              ["+bench.datasets.mine={path: x}"]]
)  # fmt: skip
def test_a_new_entry_is_given_as_a_whole(words: list[str]) -> None:
    done = run("bench.py", *words)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: bench.datasets.mine is not there yet, and a new one is given as a whole: "
        "'+bench.datasets={mine: {path: x}}'"
    )


def test_specforge_lists_its_stages() -> None:
    listed = run("-m", "specforge_exp").stdout.splitlines()
    stages = [line.split()[0] for line in listed if line.startswith("  ")]
    assert stages == list(SCRIPTS)
    assert run("-m", "specforge_exp", "--help").stdout.splitlines() == listed
    assert run("-m", "specforge_exp", "--version").stdout.startswith("specforge 0.")
    wrong = run("-m", "specforge_exp", "trian")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == f"error: trian is not a stage; choose one of: {', '.join(SCRIPTS)}\n"


def test_specforge_is_the_script() -> None:
    ours, theirs = (
        run("-m", "specforge_exp", "prep", "--cfg", "all"),
        run("prep.py", "--cfg", "all"),
    )
    assert ours.stdout == theirs.stdout and "name: prep" in ours.stdout


def test_engines_asks_before_it_installs(tmp_path: Path) -> None:
    """The package is a private person's: said, and nothing is made, unless ENGINES=1."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SPECFORGE_CACHE": f"{tmp_path}/c"}
    script = ["bash", str(REPOSITORY / "runs" / "engines.sh")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "private person" in done.stdout and "make engines ENGINES=1" in done.stdout


STOPPED = """
import sys
from specforge_exp.cli import command
def task(cfg):
    raise KeyboardInterrupt
sys.argv = ["train.py"]
command(task)()
"""


def test_ctrl_c_is_one_line_and_still_the_signal() -> None:
    done = run("-c", STOPPED)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "interrupted; run the same command again\n"


@pytest.mark.parametrize("more", [[], ["-m", "lr=1e-3,2e-3"]])
def test_a_group_without_a_name_is_said(more: list[str]) -> None:
    """run_name, and with -m the sweeper's own options, are made of it."""
    done = run("train.py", "experiment=quickstart", "loss.name=???", *more)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: these options have no value; ")
    assert done.stderr.endswith(": loss.name=...\n")


def completed(line: str, folder: Path) -> list[str]:
    """What a bash offers for a half-typed line after `eval "$(specforge -sc install=bash)"`."""
    shell = 'eval "$(specforge -sc install=bash)"; _specforge 2>&-; printf "%s " "${COMPREPLY[@]}"'
    environment = {
        **os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", shell], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


def test_tab_completes_in_a_shell(tmp_path: Path) -> None:
    """Stages, options of a stage and of a script here, groups of one's own folder."""
    mine = tmp_path / "conf" / "model" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("defaults: [tiny]\n")
    assert completed("specforge ", tmp_path) == list(SCRIPTS)
    assert completed("specforge pre", tmp_path) == ["prefetch", "prep", "preprocess", "pretrain"]
    line = "specforge train --config-dir conf -m loss=full-opd model=mi"
    assert completed(line, tmp_path) == ["model=mine", "model=mistral_small"]
    (tmp_path / "other.py").write_text("open('ran', 'w')")  # Hydra's own completion runs it
    assert completed("python other.py loss=", tmp_path) == [] and not (tmp_path / "ran").exists()
    assert completed("python train.py loss=full", REPOSITORY) == ["loss=full-opd"]


def test_what_a_job_leaves_is_forgotten_beside_the_next_one() -> None:
    stage = "specforge_exp.stages.prep:prep"
    assert loaded(stage).__name__ == "prep"
    left = Config.__new__(Config)
    left.__dict__["itself"], gone = left, ref(left)
    del left
    loaded(stage)
    gc.collect()
    assert gone() is None and gc.isenabled()


def test_triton_finds_nothing_left_at_the_end() -> None:
    pytest.importorskip("triton")
    program = """
import triton
from specforge_exp.cli import loaded
loaded("specforge_exp.data.synthetic:generate")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP elsewhere")
@pytest.mark.parametrize(
    ("theirs", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")]
)
def test_threads_that_wait_sleep_unless_the_user_wants_otherwise(
    theirs: dict[str, str], policy: str
) -> None:
    program = """
import ctypes, importlib.util, pathlib
from specforge_exp.cli import for_libraries
for_libraries()
torch = pathlib.Path(importlib.util.find_spec("torch").origin).parent
ctypes.CDLL(str(next(torch.glob("lib/libgomp*"))))
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    asked = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True,
        env={**clean, "OMP_DISPLAY_ENV": "true", **theirs},
    )  # fmt: skip
    assert f"OMP_WAIT_POLICY = '{policy}'" in asked.stderr


def test_who_runs_no_model_imports_no_compiler() -> None:
    code = (
        "import sys\n"
        "from specforge_exp.config import locate\n"
        "from specforge_exp.stages import bench, export, preprocess, regen\n"
        "for draft in 'eagle3.draft.Eagle3 peagle.draft.PEagle dflash.draft.DFlash'.split():\n"
        "    locate(f'specforge_exp.drafts.{draft}')\n"
        "assert 'torch._dynamo' not in sys.modules  # twice the seconds and memory of a start\n"
    )
    done = run("-c", code)
    assert not done.returncode, done.stderr
