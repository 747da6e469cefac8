"""Random faults against the real commands: `python tests/chaos/chaos.py --faults 200 --seed 0`.

The law: whatever happened, the same command afterwards gives the undisturbed artifact, or ends
with one line that names a command which helps, and with its help gives the undisturbed artifact.
Prints a line per fault and their counts; exit code 1 when the law was broken. `--only 17` does one
fault again; a fault depends on the seed and its number alone.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from commands import REPOSITORY, preload
from contents import Leaves, contents, differences
from faults import FAULTS, STAGES, World, changed_input, pages
from sweeps import killed_launcher, lost_container, values
from sweeps import words as sweep_words

if TYPE_CHECKING:
    from modal_local.client import LocalModal

COMMAND = re.compile(rf"({'|'.join(STAGES)})\.py((?: [\w.]+=[\w./:-]+)*)")
OPTION = re.compile(rf"\b({'|'.join([*STAGES, 'trainer'])})\.\w+=\w+")
REMOVAL = re.compile(r"(/\S+?)[ :].*remove it")
LAUNCHER, CONTAINER = 2, 1  # weights beside those of FAULTS


def settle(world: World, words: list[str], depth: int = 6) -> int:
    """Give a command until it ends well, doing what its one line says; how often that took help."""
    command = world.run(words)
    text = command.text()
    if command.code == 0:
        return 0
    assert "Traceback" not in text, text
    assert depth, f"its remedies do not end:\n{text}"
    error = text[text.rindex("error:") :] if "error:" in text else text
    others = [match for match in COMMAND.finditer(error) if match[1] != words[0]]
    if others:
        asked = world.words(others[0][1])
        helped = settle(world, [*asked, *others[0][2].split()], depth - 1)
    elif options := [*OPTION.finditer(error)]:
        option = options[-1]  # before it may stand those that the command was given
        stage = option[1]
        if stage in (words[0], "trainer"):
            return 1 + settle(world, [*words, option[0]], depth - 1)
        helped = settle(world, [*world.words(stage), option[0]], depth - 1)
    elif (removal := REMOVAL.search(error)) and world.work in Path(removal[1]).parents:
        path = Path(removal[1])
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        helped = 0
    else:
        raise AssertionError(f"no command that helps:\n{text}")
    return 1 + helped + settle(world, words, depth - 1)


def restore(world: World, name: str) -> None:
    """Make the work folder what it was."""
    shutil.rmtree(world.work, ignore_errors=True)
    shutil.copytree(world.folder / name, world.work, symlinks=True)


def pipeline(world: World) -> dict[str, Leaves]:
    """All stages once; what each makes. Their beginnings and times are noted in the world."""
    world.work.mkdir(parents=True)
    leaves = {}
    for stage in STAGES:
        shutil.rmtree(world.folder / stage, ignore_errors=True)
        shutil.copytree(world.work, world.folder / stage, symlinks=True)
        began = time.monotonic()
        command = world.run(world.words(stage))
        assert command.code == 0, command.text()
        world.seconds[stage] = time.monotonic() - began
        world.bytes[stage] = pages(world.artifacts(stage))
        leaves[stage] = contents(world.work, world.artifacts(stage))
    return leaves


class Chaos:
    """Undisturbed artifacts and what differs between two of them."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder, {})
        self.whole = pipeline(self.world)
        shutil.rmtree(self.world.work)
        again = pipeline(self.world)
        self.noise = {
            place for stage in STAGES for place in differences(self.whole[stage], again[stage])
        }
        self.stack = ExitStack()
        self.plane: LocalModal | None = None

    def sweep_reference(self) -> None:
        """What an undisturbed sweep returns."""
        if not self.world.undisturbed:
            restore(self.world, "train")
            began = time.monotonic()
            command = sweep_words(self.world, "l", "hydra/launcher=basic", "hydra.sweeper.n_jobs=2")
            done = self.world.run(command)
            assert done.code == 0, done.text()
            self.world.seconds["sweep"] = time.monotonic() - began
            self.world.undisturbed = values(self.world, "l/train")

    def modal(self) -> LocalModal:
        """The local Modal of all faults."""
        if self.plane is None:
            sys.path.append(str(REPOSITORY / "tests"))
            from modal_local import client

            options = {"max_containers": 4, "retry_delay_scale": 0}
            self.plane = self.stack.enter_context(client.start(options=options))
        return self.plane

    def equal(self, stage: str) -> None:
        """The artifact is the undisturbed one."""
        artifact = contents(self.world.work, self.world.artifacts(stage))
        places = sorted(differences(artifact, self.whole[stage]) - self.noise)
        assert not places, f"differs from the undisturbed artifact: {places[:5]}"
        names = [path.name for path in self.world.work.rglob("*")]
        assert not [name for name in names if name.endswith((".partial", ".old"))], names

    def fault(self, number: int, seed: int, sweeps: bool) -> tuple[str, str, str]:
        """One fault by its number: its kind, what happened, how it ended."""
        chance = random.Random(f"{seed}/{number}")
        weights = [*FAULTS.values(), LAUNCHER * sweeps, CONTAINER * sweeps]
        [kind] = chance.choices([*FAULTS, killed_launcher, lost_container], weights)
        if kind in FAULTS:
            stage = chance.choice(STAGES[kind is changed_input :])
            restore(self.world, stage)
            happened = f"{stage}: {kind(self.world, stage, chance)}"
            helped = settle(self.world, self.world.words(stage))
            self.equal(stage)
            return kind.__name__, happened, f"equal, with help {helped}" if helped else "equal"
        self.sweep_reference()
        restore(self.world, "train")
        if kind is killed_launcher:
            happened = killed_launcher(self.world, number, chance)
        else:
            happened = lost_container(self.world, number, chance, self.modal())
        return kind.__name__, happened, "equal"


def main(arguments: list[str]) -> int:
    """Do the faults; 1 when the law was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of faults to do again")
    parser.add_argument("--sweeps", type=int, default=1, help="0: no faults of whole sweeps")
    options = parser.parse_args(arguments)
    preload()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder))
        with chaos.stack:
            for number in options.only or range(options.faults):
                try:
                    kind, happened, end = chaos.fault(number, options.seed, bool(options.sweeps))
                except (AssertionError, TimeoutError) as error:
                    kind, happened, end = "", str(error), "BROKEN"
                counts[f"{kind} {end}".strip()] += 1
                print(f"{number:4} {kind}: {happened}: {end}", flush=True)
    print(json.dumps({"seed": options.seed, "counts": dict(sorted(counts.items()))}))
    return 1 if counts["BROKEN"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
