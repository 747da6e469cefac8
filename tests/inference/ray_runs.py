"""Trainings of the Ray tests: twelve steps of the tiny target, with and without workers."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import conftest
import pytest
import warm
from conftest import REPOSITORY, SMALL, make_config
from holding import environment
from safetensors import safe_open
from test_ranks import with_all_below
from test_resume import lines
from warm_spares import FORK_SERVER

from specforge_exp import paths
from specforge_exp.config import Config, from_omegaconf
from specforge_exp.stages.prep import prep
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.training.checkpoint import step_folders
from specforge_exp.training.progress import SECONDS

STEPS = 24
UNLIKE = ("seconds", "tokens_per_s", "supervised_tokens_per_s", "mfu", "peak_memory_mb")
UNLIKE += ("data_wait", "worker_busy", "states_held_mb")
"""What two runs of the same numbers log differently."""
DFLASH = ("draft=dflash", "draft.block_size=4", "draft.num_layers=2", "draft.num_features=2")
RAY = ("target.placement=ray", "target.buffer_gb=0.012")


def prepared(folder: Path) -> Path:
    """The folder, with the tokens of all trainings."""
    cfg = make_config(folder)
    cfg.preprocess.source = "prep"
    prep(cfg)
    preprocess(cfg)
    return folder


def options(folder: Path, name: str, *more: str) -> list[str]:
    """Overrides of one training."""
    return [
        "experiment=smoke", "model=tiny", "loss=baseline", *SMALL, "max_length=256",
        f"paths.datasets={folder / 'datasets'}", f"paths.checkpoints={folder / 'checkpoints'}",
        f"run_name={name}", f"max_steps={STEPS}", "epochs=30", "lr=1e-3", "trainer.batch_size=4",
        "trainer.log_every=1", "trainer.save_every=4", "trainer.eval_every=9", *more,
    ]  # fmt: skip


def composed(folder: Path, name: str, *more: str) -> Config:
    """The same as a configuration."""
    return from_omegaconf(conftest.composed(*options(folder, name, *more)))


STARTED: list[warm.Started] = []
"""Since the test began."""


def start(arguments: list[str], log: Path, several: int = 1) -> warm.Started:
    """Run in a session of its own, with spares for that many trainings."""
    env = {**environment(), "OMP_NUM_THREADS": "1"}
    run = warm.start(arguments, env=env, session=True, log=log, spares=several)
    STARTED.append(run)
    return run


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """Kills what a test has left, as it failed: the next one would find it in its way."""
    yield
    for run in STARTED:
        if run.poll() is None:
            for pid in with_all_below(run.pid):
                with suppress(ProcessLookupError):
                    kill(pid)
            run.wait()
    STARTED.clear()


def begin(folder: Path, name: str, *more: str) -> warm.Started:
    """Start train.py with workers; its output goes to <name>.log."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *options(folder, name, *RAY, *more)]
    return start(command, folder / f"{name}.log")


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()


def processes(pid: int, words: str) -> list[int]:
    """Those below a process whose command line holds some words."""
    below = with_all_below(pid)
    return [p for p in below if re.search(words, command_line(p))]


def trainers(pid: int) -> list[int]:
    """The processes below one that train, not the launcher's server that forks them."""
    forked = [p for p in with_all_below(pid) if name_of(p) == FORK_SERVER]
    return [p for p in forked if name_of(parent(p)) == FORK_SERVER]


def name_of(pid: int) -> str:
    """What the kernel calls it; "": it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def parent(pid: int) -> int:
    """Of a process; 0: it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pids: list[int]) -> list[str]:
    """Of these processes those that still run."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [
        f"{pid} {command_line(pid)[:60]}"
        for pid, stat in states.items()
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def assert_equal(cfg: Config, name: str, reference: str) -> None:
    """Every logged number that is no duration, and every tensor of the last checkpoint."""
    rows = [
        [{k: v for k, v in line.items() if k not in UNLIKE} for line in lines(cfg, run)]
        for run in (name, reference)
    ]
    assert rows[0] == rows[1] and len(rows[0]) > STEPS
    folders = [step_folders(paths.run_dir(cfg).with_name(run))[-1] for run in (name, reference)]
    assert folders[0].name == folders[1].name
    for file in sorted(folders[0].glob("*.safetensors")):
        with safe_open(file, "pt") as own, safe_open(folders[1] / file.name, "pt") as other:
            assert sorted(own.keys()) == sorted(other.keys())
            for key in {*own.keys()} - {SECONDS}:
                assert own.get_tensor(key).equal(other.get_tensor(key)), (file.name, key)


def counted(text: str) -> dict[str, float]:
    """The account that a training gives of its states."""
    found = re.findall(
        r"states of (\d+) conversations asked for, (\d+) taken, (\d+) asked for again, at most "
        r"(\S+) MB held",
        text,
    )
    names = ("asked", "taken", "again", "held_mb")
    return dict(zip(names, map(float, found[-1]), strict=True))


def planned(first: int, last: int, held_out: int = 4) -> int:
    """Conversations that the steps after `first` up to `last` use, with their evaluations."""
    evaluations = sum(step % 9 == 0 or step == last for step in range(first + 1, last + 1))
    return 4 * (last - first) + held_out * evaluations
