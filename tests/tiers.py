"""Runs the tests of one tier: `python tests/tiers.py fast`; without a name, lists the tiers.

`all` is every tier, `rest` every one but `fast`. A tier is some folders and a marker; a file that
one names is in no other with that marker. Its tests share three processes; of several tiers four
run beside each other, in one process each, the longest first: for two cores, so that two compute
while the others wait, as slow tests do more. Tests marked `timing`, which assert how long something
takes, then run alone in one. Only they are tried a second time, and whatever was is named at the
end.
"""

import ctypes
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTHING_COLLECTED = 5
BESIDE = "--beside"
AT_ONCE = 3
TIERS_AT_ONCE = 4
TOGETHER = ("--dist", "loadfile", "--no-loadscope-reorder")
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER: orphans become this process's, so that their CPU time is counted."""


WARM: dict[str, str] = {}
"""Tells the tests where the forking processes are that all of a tier share."""


@dataclass(frozen=True)
class Tier:
    """Tests that run together."""

    about: str
    folders: tuple[str, ...]
    budget: int
    """CPU seconds, on the machine of docs/log.md."""
    marker: str = "slow"


RESUMED = tuple(
    f"specforge_exp/test_{name}.py" for name in ("resume", "ranks", "causal_runs", "streamed")
)
TIERS = {
    "fast": Tier(
        "every module, one launch and one kill of each kind",
        ("modal_sweep", "end_to_end", "hydra_sweeps", "specforge_exp", "test_layers.py"),
        1100,
        "not slow",
    ),
    "trainer": Tier("the trainer's long tests but those of resume", ("specforge_exp",), 600),
    "resume": Tier("runs killed and resumed, several ranks, streams", RESUMED, 400),
    "modal": Tier("sweeps on a local Modal, killed everywhere", ("modal_sweep",), 220),
    "sweeps": Tier("grids and studies, killed again and again", ("hydra_sweeps",), 70),
    "end": Tier("whole pipelines as commands, here and on a local Modal", ("end_to_end",), 610),
    "local-modal": Tier("the local Modal itself", ("modal_local",), 80, "slow or not slow"),
    "chaos": Tier("random faults; `python tests/chaos/chaos.py` makes any number", ("chaos",), 130),
    "ray": Tier(
        "the target in workers of its own, killed everywhere",
        ("inference",),
        430,
        "slow or not slow",
    ),
    "bench": Tier("the benchmarks' own halves", ("benchmarks",), 115, "slow or not slow"),
}


def cache(name: str) -> Path:
    """Where pytest remembers what failed; of its own for a tier, as two may run."""
    return ROOT / ".pytest_cache" / name


def pytest(name: str, marker: str, *options: str, files: Sequence[Path] = ()) -> int:
    """Run those tests of a tier, or of some files of it, that have the marker; its exit code, 0
    when there are none."""
    tier = TIERS[name]
    expression = f"({tier.marker}) and ({marker}) and not gpu and not live and not engines"
    folders = [*map(str, files)] or [str(ROOT / "tests" / folder) for folder in tier.folders]
    others = [each for each in TIERS.values() if each.marker == tier.marker and each is not tier]
    theirs = {ROOT / "tests" / one for each in others for one in each.folders if one[-3:] == ".py"}
    options = (*options, *(f"--ignore={file}" for file in sorted(theirs)))
    command = [sys.executable, "-m", "pytest", "-m", expression, "-o", f"cache_dir={cache(name)}"]
    # What was compiled once is read, by the tests and by what they start, as with a user.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= WARM
    done = subprocess.run([*command, *options, *folders], cwd=ROOT, env=environment, check=False)
    return 0 if done.returncode == NOTHING_COLLECTED else done.returncode


def timed(name: str) -> list[Path]:
    """A tier's files that have tests marked `timing`: to collect all for a few takes longer."""
    places = [ROOT / "tests" / folder for folder in TIERS[name].folders]
    files = [
        file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))
    ]
    texts = {file: file.read_text() for file in sorted(files)}
    slow = TIERS[name].marker == "slow"
    return [
        file
        for file, text in texts.items()
        if "mark.timing" in text and ("mark.slow" in text or not slow)
    ]


def cpu_seconds() -> float:
    """CPU seconds of all processes below this one that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:  # those whose parents have not waited for them
            pass
    except ChildProcessError:
        pass
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def alone(name: str) -> bool:
    """Run the tests of a tier that assert a duration, those that fail twice; whether all passed."""
    files = timed(name)
    if not files:
        return True
    last = cache(name) / "v" / "cache" / "lastfailed"
    last.unlink(missing_ok=True)
    if not (code := pytest(name, "timing", files=files)):
        return True
    again = sorted(json.loads(last.read_text())) if code == 1 and last.exists() else []
    if again:
        again_only = ("--last-failed", "--last-failed-no-failures", "none")
        code = pytest(name, "timing", *again_only, files=files)
    for test in again:
        print(f"tier {name}: tried a second time: {test}", flush=True)
    return not code


@contextmanager
def forking_processes() -> Iterator[None]:
    """A place for those of tests/warm.py; they end when nobody holds `alive` open any more."""
    if sys.platform != "linux":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        os.mkfifo(f"{folder}/alive")
        alive = os.open(f"{folder}/alive", os.O_RDWR)
        WARM["WARM_FOLDER"] = folder
        try:
            yield
        finally:
            WARM.clear()
            os.close(alive)
            for file in Path(folder).glob("*.pid"):
                with suppress(ProcessLookupError):
                    ended = os.pidfd_open(int(file.read_text()))
                    select.select([ended], [], [], 60)
                    os.close(ended)


def run(name: str, *options: str, timing: bool = True) -> bool:
    """Run a tier and say what it took; whether all of it passed."""
    began, before = time.monotonic(), cpu_seconds()
    with forking_processes():
        passed = not pytest(name, "not timing", "--durations=10", *options)
        passed &= alone(name) if timing else True
    seconds, cpu = time.monotonic() - began, cpu_seconds() - before
    print(f"tier {name}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s, ", end="")
    print(f"{cpu:.0f} CPU s of a budget of {TIERS[name].budget}", flush=True)
    return passed


def beside(name: str) -> bool:
    """Run a tier in a process of its own and show it whole when it has ended."""
    print(f"tier {name}: begins\n", end="", flush=True)  # one piece: several threads print
    command = [sys.executable, __file__, BESIDE, name]
    done = subprocess.run(
        command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(done.stdout, flush=True)
    return not done.returncode


def main(names: list[str]) -> int:
    """Run the named tiers, the others also when one fails."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1)
    if names[:1] == [BESIDE]:
        return 0 if run(names[1], timing=False) else 1
    if not names or set(names) - {*TIERS, "all", "rest"}:
        for name, tier in TIERS.items():
            print(f"{name:12} {tier.about}")
        return 1 if names else 0
    several = {"all": list(TIERS), "rest": [name for name in TIERS if name != "fast"]}
    chosen = [tier for name in names for tier in several.get(name, [name])]
    whole = [name for name in chosen if name == "fast" or len(chosen) == 1]
    outcomes = [run(name, "-n", str(AT_ONCE), *TOGETHER) for name in whole]
    halves = sorted(set(chosen) - set(whole), key=lambda name: -TIERS[name].budget)
    with ThreadPoolExecutor(TIERS_AT_ONCE) as some:
        outcomes += some.map(beside, halves)
    outcomes += [alone(name) for name in halves]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
