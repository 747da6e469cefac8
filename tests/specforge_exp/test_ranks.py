"""As many processes as there are, sharing target and draft or not: the same numbers."""

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from test_resume import command, finish, lines, losses, start, wait_for_step

from specforge_exp.config import Config


def listening(session: int) -> list[str]:
    """Local addresses, in hexadecimal, on which processes of a session accept connections."""
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            if os.getsid(pid) == session:
                links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
                inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


@pytest.mark.slow
def test_one_process_or_two(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """The same losses and metrics; a run may go on with another number of processes.

    Nothing listens beyond loopback.
    """
    log = tmp_path / "log"
    finish(command(cfg, "one"), log)
    finish(command(cfg, "two", "trainer.gpus=2"), log)
    compared = ("loss", "ce", "alpha/0", "top1/2", "simulated_length", "supervised")
    for one, two in zip(lines(cfg, "one"), lines(cfg, "two"), strict=True):
        for key in compared:
            name = key if key in one else f"eval/{key}"
            assert two[name] == pytest.approx(one[name], rel=2e-5), (one["step"], name)
    both = command(cfg, "both", "trainer.save_every=2")
    process = start([*both, "trainer.gpus=2"], log)
    wait_for_step(process, cfg, "both", 5)
    if sys.platform == "linux":
        assert set(listening(process.pid)) == {"0100007F"}  # 127.0.0.1
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "continuing after step" in finish(both, log)
    assert dict(losses(cfg, "both")) == pytest.approx(dict(losses(cfg, "one")), rel=2e-5)


@pytest.mark.slow
def test_a_shared_target(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """Two processes that share the target's layers train as one that holds it."""
    log = tmp_path / "log"
    finish(command(cfg, "alone", "max_steps=8"), log)
    for cache in ("none", "disk"):
        options = ("max_steps=8", f"target.cache={cache}", "trainer.pack_tokens=300")
        shared = ("target.shard=true", "trainer.gpus=2")
        finish(command(cfg, cache, *options, *shared), log)
        assert dict(losses(cfg, cache)) == pytest.approx(dict(losses(cfg, "alone")), rel=2e-5)


@pytest.mark.slow
def test_a_shared_draft(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """FSDP2 in two processes, packed so that they differ in forwards; killed, and gone on alone."""
    log = tmp_path / "log"
    options = ("max_steps=12", "trainer.pack_tokens=150", "trainer.eval_every=5")
    shared = command(cfg, "shared", *options, "trainer.shard=true", "trainer.gpus=2")
    process = start(shared, log)
    wait_for_step(process, cfg, "shared", 7)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "continuing after step" in finish(command(cfg, "shared", *options), log)
    finish(command(cfg, "alone", *options), log)
    assert dict(losses(cfg, "shared")) == pytest.approx(dict(losses(cfg, "alone")), rel=2e-5)
    finish([*shared, "run_name=again"], log)
    finish([*shared, "run_name=again"], log)
    assert dict(losses(cfg, "again")) == pytest.approx(dict(losses(cfg, "alone")), rel=2e-5)


@pytest.mark.slow
def test_eight_processes(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """Twenty steps of eight conversations on eight processes over gloo."""
    options = ("trainer.batch_size=8", "max_steps=20", "trainer.eval_every=50")
    finish(command(cfg, "one", *options), tmp_path / "log")
    finish(command(cfg, "eight", *options, "trainer.gpus=8"), tmp_path / "log")
    alone = dict(losses(cfg, "one"))
    assert dict(losses(cfg, "eight")) == pytest.approx(alone, rel=2e-5)
    assert len(alone) == 20


@pytest.mark.slow
def test_a_refusal_of_a_process_is_one_line(cfg: Config, tokens: Path, tmp_path: Path) -> None:
    """A loss that is not a number, in two processes: no traceback, and what to do."""
    log = tmp_path / "log"
    process = start(command(cfg, "nan", "trainer.gpus=2", "lr=1e30", "trainer.clip=1e30"), log)
    assert process.wait(timeout=300) == 1
    assert "Traceback" not in log.read_text()
    assert re.search(r"error: the loss is (nan|inf) at step \d+", log.read_text())
