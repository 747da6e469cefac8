"""The faults, each a function from a world and a stage to what it did, in words.

A fault leaves the world as an accident would; `chaos.settle` then asks for the law. What a fault
finds wrong by itself is an AssertionError.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import Command, run, start

STAGES = ("prep", "regen", "preprocess", "train", "export", "bench")
OPTIONS = {
    "prep": ("data.train=[{path: 'synthetic:train', limit: 8}]", "data.max_turns=1"),
    "regen": ("regen.max_tokens=16", "seed=1", "regen.temperature=0.5"),
    "preprocess": ("max_length=256", "draft.draft_vocab_size=256"),
    "train": ("lr=2e-3", "seed=1", "max_steps=9", "draft.ttt_length=3", "trainer.batch_size=2"),
    "export": ("export.dtype=float32",),
    "bench": ("bench.max_tokens=8", "bench.chain_length=3"),
}
DAMAGES = ("truncated", "zeroed", "flipped", "emptied", "braces", "brackets", "removed")
PAGE = 4096
UNREAD = {".log", ".lock", ".lease"}


@dataclass
class World:
    """A folder of artifacts, what it looked like before each stage, and what a stage takes."""

    folder: Path
    seconds: dict[str, float]
    bytes: dict[str, int] = field(default_factory=dict)
    """What a stage writes, in whole pages."""
    undisturbed: dict[str, Any] = field(default_factory=dict)
    """What the runs of a sweep return, by the loss."""

    @property
    def work(self) -> Path:
        """Where the commands write; always the same place, because records hold paths."""
        return self.folder / "work"

    @property
    def run_folder(self) -> Path:
        """The run's checkpoints."""
        return self.work / "checkpoints" / "smoke_tiny_full-opd"

    def words(self, stage: str) -> list[str]:
        """A stage's command: seconds of work, several checkpoints, several blocks."""
        return [
            stage, "experiment=smoke", "model=tiny", f"paths.datasets={self.work / 'datasets'}",
            f"paths.checkpoints={self.work / 'checkpoints'}", "max_steps=12", "epochs=3",
            "trainer.save_every=3", "trainer.eval_every=5", "trainer.log_every=1",
        ]  # fmt: skip

    def inputs(self, stage: str) -> Path:
        """The artifact that a stage reads first."""
        datasets = self.work / "datasets"
        return {
            "prep": datasets,  # nothing yet: its corpus is a part of the program
            "regen": datasets / "smoke",
            "preprocess": datasets / "smoke--tiny",
            "train": datasets / "smoke--tiny.tokens",
            "export": self.run_folder,
            "bench": self.run_folder / "export",
        }[stage]

    def artifacts(self, stage: str) -> list[Path]:
        """What a stage makes."""
        datasets = self.work / "datasets"
        if stage == "train":
            others = {"export", "bench.json", "export.partial", ".hydra"}
            return [path for path in self.run_folder.glob("*") if path.name not in others]
        return {
            "prep": [datasets / "smoke"],
            "regen": [datasets / "smoke--tiny"],
            "preprocess": [datasets / "smoke--tiny.tokens"],
            "export": [self.run_folder / "export"],
            "bench": [self.run_folder / "bench.json"],
        }[stage]

    def run(self, words: list[str]) -> Command:
        """A command to its end."""
        return run(words, self.work, self.folder / "log")

    def start(self, words: list[str], name: str = "log") -> Command:
        """A command that goes on."""
        return start(words, self.work, self.folder / name)


def pages(places: list[Path]) -> int:
    """Bytes that files and folders take on a disk of 4 KiB pages."""
    paths = [path for place in places for path in (place, *place.rglob("*"))]
    return sum(-(-path.stat().st_size // PAGE) * PAGE + PAGE * path.is_dir() for path in paths)


def interrupted(world: World, stage: str, chance: random.Random, earliest: float = 0.0) -> str:
    """Start a stage and kill it somewhere in it, not before that share of its time."""
    moment = chance.uniform(earliest, 1.1) * world.seconds[stage]
    command = world.start(world.words(stage))
    while not command.ended() and time.monotonic() - command.began < moment:
        time.sleep(0.002)
    running = command.kill()
    return f"killed after {moment:.2f} s" if running else f"ended before {moment:.2f} s"


def kill(world: World, stage: str, chance: random.Random) -> str:
    """One to three kills of the same command."""
    return ", ".join(interrupted(world, stage, chance) for _ in range(chance.randint(1, 3)))


def damaged(path: Path, chance: random.Random) -> str:
    """Harm one file; how."""
    content, how = path.read_bytes(), chance.choice(DAMAGES)
    place = chance.randrange(len(content)) if content else 0
    if how == "removed":
        path.unlink()
        return how
    path.write_bytes(
        {
            "truncated": content[:place],
            "zeroed": b"\0" * len(content),
            "flipped": bytes(
                byte ^ (1 << chance.randrange(8)) if at == place else byte
                for at, byte in enumerate(content)
            ),
            "emptied": b"",
            "braces": b"{}",
            "brackets": b"[]",
        }[how]
    )
    return how


def harm_a_file(folder: Path, chance: random.Random) -> str:
    """Harm a random file below a folder; which and how."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in UNREAD and ".hydra" not in path.parts
    )
    if not files:
        return "nothing there to change"
    path = chance.choice(files)
    return f"{path.relative_to(folder)} {damaged(path, chance)}"


def changed_input(world: World, stage: str, chance: random.Random) -> str:
    """A file of what the stage reads is harmed."""
    return harm_a_file(world.inputs(stage), chance)


def changed_partial(world: World, stage: str, chance: random.Random) -> str:
    """The stage is killed, then a file of what it has so far is harmed."""
    before = {path: path.stat().st_mtime_ns for path in world.work.rglob("*") if path.is_file()}
    moment = interrupted(world, stage, chance, earliest=0.4)
    files = sorted(
        path
        for path in world.work.rglob("*")
        if path.is_file() and path.suffix not in UNREAD and ".hydra" not in path.parts
        if before.get(path) != path.stat().st_mtime_ns
    )
    if not files:
        return f"{moment}, nothing written yet"
    path = chance.choice(files)
    return f"{moment}, {path.relative_to(world.work)} {damaged(path, chance)}"


def second_process(world: World, stage: str, chance: random.Random) -> str:
    """The same command twice: the second one waits for nobody and says whom it met."""
    first = world.start(world.words(stage), "first.log")
    moment = chance.uniform(0.0, 0.7) * world.seconds[stage]
    while not first.ended() and time.monotonic() - first.began < moment:
        time.sleep(0.002)
    second = world.start(world.words(stage), "second.log")
    codes = [first.wait(), second.wait()]
    texts = [first.text(), second.text()]
    for code, text, other in zip(codes, texts, (second, first), strict=True):
        assert "Traceback" not in text, text
        assert code == 0 or str(other.pid) in text, f"does not name the other process:\n{text}"
    assert 0 in codes, "\n".join(texts)
    return f"second after {moment:.2f} s, exit codes {codes[0]} and {codes[1]}"


def other_option(world: World, stage: str, chance: random.Random) -> str:
    """Killed, then started with another option."""
    moment, option = interrupted(world, stage, chance), chance.choice(OPTIONS[stage])
    other = world.run([*world.words(stage), option])
    assert "Traceback" not in other.text(), other.text()
    return f"{moment}, then {option}: exit code {other.code}"


def full_disk(world: World, stage: str, chance: random.Random) -> str:
    """A disk with too little room for the stage; afterwards it has more."""
    work, aside = world.work, world.folder / "aside"
    work.rename(aside)
    work.mkdir()
    room = int(chance.uniform(0.0, 1.5) * world.bytes[stage])
    mount = ["mount", "-t", "tmpfs", "-o", f"size={pages([aside]) + room}", "tmpfs", str(work)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not mounted:
        work.rmdir()
        aside.rename(work)
        return "no disk can be mounted here"
    try:
        shutil.copytree(aside, work, dirs_exist_ok=True)
        command = world.run(world.words(stage))
        text = command.text()
        assert "Traceback" not in text, text
        assert command.code == 0 or "disk is full" in text, text
    finally:
        shutil.rmtree(aside)
        shutil.copytree(work, aside, symlinks=True)
        subprocess.run(["umount", str(work)], check=True)
        work.rmdir()
        aside.rename(work)
    return f"{room} bytes of room, exit code {command.code}"


FAULTS = {
    kill: 4,
    changed_input: 4,
    changed_partial: 3,
    second_process: 2,
    other_option: 3,
    full_disk: 2,
}
"""Faults of a stage and how often each is drawn."""
