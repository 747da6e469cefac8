"""Runs the tests of one tier: `python tests/tiers.py fast`; without a name, lists the tiers.

`all` is every tier, `rest` every one but `fast`. A tier is some folders and a marker. Its tests
share two processes; those marked `timing`, which assert how long something takes, then run alone
in one. Only they are tried a second time, and whatever was is named at the end.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".pytest_cache" / "v" / "cache" / "lastfailed"
NOTHING_COLLECTED = 5


@dataclass(frozen=True)
class Tier:
    """Tests that run together."""

    about: str
    folders: tuple[str, ...]
    budget: int
    """CPU seconds, on the machine of docs/log.md."""
    marker: str = "slow"


TIERS = {
    "fast": Tier(
        "every module, one launch and one kill of each kind",
        ("test_layers.py", "specforge_exp", "modal_sweep", "hydra_sweeps", "end_to_end"),
        1100,
        "not slow",
    ),
    "trainer": Tier("the trainer's long runs, killed and resumed", ("specforge_exp",), 1000),
    "modal": Tier("sweeps on a local Modal, killed everywhere", ("modal_sweep",), 450),
    "sweeps": Tier("grids and studies, killed again and again", ("hydra_sweeps",), 250),
    "end": Tier("whole pipelines as commands, here and on a local Modal", ("end_to_end",), 600),
    "local-modal": Tier("the local Modal itself", ("modal_local",), 300, "slow or not slow"),
    "chaos": Tier("random faults; `python tests/chaos/chaos.py` makes any number", ("chaos",), 200),
    "ray": Tier(
        "the target in workers of its own, killed everywhere",
        ("inference",),
        400,
        "slow or not slow",
    ),
    "bench": Tier("the benchmarks' own halves", ("benchmarks",), 150, "slow or not slow"),
}


def pytest(tier: Tier, marker: str, *options: str) -> int:
    """Run those tests of a tier that have the marker; its exit code, 0 when there are none."""
    expression = f"({tier.marker}) and ({marker}) and not gpu and not live and not engines"
    folders = [str(ROOT / "tests" / name) for name in tier.folders]
    command = [sys.executable, "-m", "pytest", "-m", expression, *options, *folders]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return 0 if code == NOTHING_COLLECTED else code


def timed(tier: Tier) -> bool:
    """Whether a file of the tier has tests marked `timing`; collecting all to see none is slow."""
    places = [ROOT / "tests" / name for name in tier.folders]
    files = [
        file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))
    ]
    return any("mark.timing" in file.read_text() for file in files)


def cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def failed() -> list[str]:
    """Tests that failed when they last ran."""
    return sorted(json.loads(CACHE.read_text())) if CACHE.exists() else []


def run(name: str) -> bool:
    """Run a tier and say what it took; whether all of it passed."""
    tier, began, before = TIERS[name], time.monotonic(), cpu_seconds()
    CACHE.unlink(missing_ok=True)
    together = pytest(tier, "not timing", "-n", "2", "--dist", "loadfile", "--durations=10")
    CACHE.unlink(missing_ok=True)
    alone, again = pytest(tier, "timing") if timed(tier) else 0, []
    if alone == 1:
        again = failed()
        alone = pytest(tier, "timing", "--last-failed", "--last-failed-no-failures", "none")
    seconds, cpu = time.monotonic() - began, cpu_seconds() - before
    passed = not together and not alone
    print(f"tier {name}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s, ", end="")
    print(f"{cpu:.0f} CPU s of a budget of {tier.budget}", flush=True)
    for test in again:
        print(f"tier {name}: tried a second time: {test}", flush=True)
    return passed


def main(names: list[str]) -> int:
    """Run the named tiers one after the other, the rest also when one fails."""
    if not names or set(names) - {*TIERS, "all", "rest"}:
        for name, tier in TIERS.items():
            print(f"{name:12} {tier.about}")
        return 1 if names else 0
    several = {"all": list(TIERS), "rest": [name for name in TIERS if name != "fast"]}
    chosen = [tier for name in names for tier in several.get(name, [name])]
    outcomes = [run(name) for name in chosen]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
