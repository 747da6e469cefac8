"""200 no-op jobs: our launcher beside hydra-modal-launcher 0.3.0, on the same local control plane.

    python benchmarks/launcher.py [--json] [--jobs 200] [--runs 3]

Each side has a virtual environment of its own (both register hydra/launcher=modal), made by the
first run, with the same versions of modal and Hydra, and one instance of tests/modal_local with two
reused containers. Runs alternate, in both orders. `wall` is the whole command; `launch CPU` is the
process CPU time of launch() without load_sweep_config, per job. Ours brings every job's files back
within that time, the peer leaves them in the container. A last, smaller run of ours takes a new
container for every job.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARED = ("hydra-core", "omegaconf", "cloudpickle", "modal")
FLAGS = {
    "ours": ["hydra.launcher.max_parallel=2", "hydra.launcher.max_usd=null"],
    "peer": ["hydra.launcher.parallelism=2"],
}
SINGLE_USE_JOBS = 20


def environment(side: str, folder: Path) -> Path:
    """The interpreter of a side's virtual environment, made when it is missing."""
    venv = folder / side
    python, ready = venv / "bin" / "python", venv / "ready"
    if not ready.exists():
        print(f"making {venv}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *(f"{name}=={version(name)}" for name in SHARED)], check=True)
        if side == "peer":
            subprocess.run([*install, "--no-deps", "hydra-modal-launcher==0.3.0"], check=True)
        ready.touch()
    if side == "ours":
        link(venv)
    return python


def link(venv: Path) -> None:
    """Our packages as they are in this checkout, where an installation would put them."""
    [packages] = venv.glob("lib/python*/site-packages")
    (packages / "hydra_plugins").mkdir(exist_ok=True)
    for name in ("hydra_plugins/modal_launcher", "modal_sweep"):
        if not (packages / name).is_symlink():
            (packages / name).symlink_to(ROOT / name)


def start_control_plane(
    python: Path, folder: Path
) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """One instance of tests/modal_local; the process, and what its clients need."""
    file = folder / "control.json"
    command = [str(python), "-m", "tests.modal_local", "--env-file", str(file)]
    process = subprocess.Popen(
        [*command, "--option", "max_containers=2"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while not file.exists():
        if process.poll() is not None:
            raise SystemExit("tests/modal_local did not start")
        time.sleep(0.05)
    control = json.loads(file.read_text())
    assert isinstance(control, dict)
    return process, control


def measure(
    python: Path, control: dict[str, Any], folder: Path, jobs: int, flags: list[str]
) -> dict[str, float]:
    """One sweep in a process of its own."""
    app = folder / "app"
    app.mkdir(exist_ok=True)
    script = app / "noop_sweep.py"
    script.write_text((HERE / "noop_sweep.py").read_text())
    with tempfile.TemporaryDirectory(dir=folder) as sweep:
        record = Path(sweep) / "record.json"
        command = [str(python), str(script), str(record), "-m", "hydra/launcher=modal"]
        command += [f"+i=range({jobs})", f"hydra.sweep.dir={sweep}/out", *flags]
        start = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=app,
            env={**os.environ, **{name: str(value) for name, value in control.items()}},
            capture_output=True,
            text=True,
            check=False,
        )
        wall = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        spent = json.loads(record.read_text())
    own = spent["launch"] - spent["compose"]
    return {"wall_s": round(wall, 2), "launch_cpu_ms_per_job": round(1000 * own / jobs, 2)}


def main() -> None:
    """Alternate both sides in both orders, print every run and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3, help="per side and order")
    parser.add_argument("--venvs", type=Path, default=ROOT / "artifacts" / "launcher_venvs")
    parser.add_argument("--json", action="store_true", help="only the last line")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    processes = []
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as scratch:
        sides = {}
        for side in ("ours", "peer"):
            folder = Path(scratch) / side
            folder.mkdir()
            python = environment(side, args.venvs)
            process, control = start_control_plane(python, folder)
            processes.append(process)
            sides[side] = (python, control, folder)
        try:
            for order in (("ours", "peer"), ("peer", "ours")):
                for _ in range(args.runs):
                    for side in order:
                        figures = measure(*sides[side], args.jobs, FLAGS[side])
                        runs.append({"side": side, "first": order[0], **figures})
                        if not args.json:
                            print(json.dumps(runs[-1]), flush=True)
            flags = [*FLAGS["ours"], "hydra.launcher.single_use=true"]
            single = measure(*sides["ours"], SINGLE_USE_JOBS, flags)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
    print(json.dumps(report(runs, args.jobs, single)))


def report(runs: list[dict[str, Any]], jobs: int, single: dict[str, float]) -> dict[str, Any]:
    """Medians, and everything that was measured."""

    def median(side: str, name: str) -> float:
        values = [float(run[name]) for run in runs if run["side"] == side]
        return round(statistics.median(values), 2)

    return {
        "jobs": jobs,
        "ours_wall_s": median("ours", "wall_s"),
        "peer_wall_s": median("peer", "wall_s"),
        "ours_launch_cpu_ms_per_job": median("ours", "launch_cpu_ms_per_job"),
        "peer_launch_cpu_ms_per_job": median("peer", "launch_cpu_ms_per_job"),
        "ours_single_use": {"jobs": SINGLE_USE_JOBS, **single},
        "runs": runs,
    }


if __name__ == "__main__":
    main()
