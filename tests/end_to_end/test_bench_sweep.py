"""sweep.json is read, its runs are found, and `bench.py sweep=` benches those that are finished."""

import json
import logging
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm

from specforge_exp.config import Config, InputError, Source
from specforge_exp.report.record import find_sweep, read_sweep
from specforge_exp.stages import bench_sweep as module
from specforge_exp.stages.bench_sweep import bench_sweep, ranking
from specforge_exp.stages.export import export
from specforge_exp.stages.train import train

ROOT = Path(__file__).resolve().parents[2]


def entry(number: int, name: str, status: str = "completed", **record: Any) -> dict[str, Any]:
    """A run as the sweeper records it."""
    return {
        "number": number, "name": name, "overrides": [],
        "command": f"python train.py run_name={name}",
        "status": status, "value": None, "error": None, "started": None, "seconds": 1.0,
        "digest": "d", "record": {"run_name": name, **record}, "params": {},
    }  # fmt: skip


def write_sweep(folder: Path, runs: list[dict[str, Any]], cwd: Path, **changes: Any) -> Path:
    """A sweep.json."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep = {
        "version": 1, "kind": "grid", "script": "train", "command": "python train.py -m lr=1,2",
        "cwd": str(cwd), "objectives": [{"name": "simulated_length", "direction": "maximize"}],
        "started": "2026-01-01T00:00:00", "updated": "2026-01-01T00:00:00", "state": "complete",
        "runs": runs,
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(sweep | changes))
    return folder


@pytest.fixture(scope="module")
def trained(made_tokens: Config) -> Config:
    """Two finished trainings, `one` and `two`."""
    cfg = deepcopy(made_tokens)
    cfg.max_steps, cfg.draft.ttt_length = 2, 2
    for name, lr in (("one", 1e-3), ("two", 2e-3)):
        train(replace(cfg, run_name=name, lr=lr))
    return cfg


@pytest.fixture
def two_runs(cfg: Config, tokens: Path, trained: Config) -> Config:
    """Copies of `trained`; returns the options of the bench."""
    for name in ("one", "two"):
        copy = Path(cfg.paths.checkpoints) / name
        shutil.copytree(Path(trained.paths.checkpoints) / name, copy)
    line = deepcopy(cfg)  # a command line that says nothing about the runs
    line.run_name, line.draft.ttt_length, line.model.name = "other", 7, "another"
    line.bench.max_tokens, line.bench.bootstrap, line.bench.chain_length = 8, 20, 2
    line.bench.datasets = {"stories": Source(path="synthetic:bench/stories", limit=2)}
    return line


def test_every_finished_run_is_benched_with_its_own_options(
    two_runs: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    checkpoints = Path(two_runs.paths.checkpoints)
    runs = [
        entry(0, "one", run_dir="checkpoints/one"),  # relative to where the sweep was started
        entry(1, "two"),  # beside the folder of the sweeps
        entry(2, "three", "failed"),
        entry(3, "four", "running"),
    ]
    folder = write_sweep(checkpoints / "sweeps" / "s" / "train", runs, tmp_path)
    two_runs.sweep = str(folder)
    best = bench_sweep(two_runs)
    results = {n: json.loads((checkpoints / n / "bench.json").read_text()) for n in ("one", "two")}
    assert [results[n]["config"]["lr"] for n in ("one", "two")] == [1e-3, 2e-3]
    for result in results.values():
        assert result["config"]["draft"]["ttt_length"] == 2
        assert result["settings"]["chain_length"] == 2
        assert list(result["datasets"]) == ["stories"]
    assert best == max(result["average"] for result in results.values())
    table = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in table[table.index(next(x for x in table if x[:3] == "run")) :]]
    assert [row[0] for row in rows[1:]] == sorted(results, key=lambda n: -results[n]["average"])
    assert rows[1][1] == f"{best:.2f}"
    said = caplog.text
    assert "1/2 one" in said and "2/2 two" in said
    assert "2 of 4 runs are not finished" in said
    assert f"python report.py sweep={folder}" in said
    caplog.clear()
    before = (checkpoints / "one" / "bench.json").stat().st_mtime_ns
    assert bench_sweep(two_runs) == best
    assert (checkpoints / "one" / "bench.json").stat().st_mtime_ns == before
    assert caplog.text.count("bench: complete, reused") == 2


def test_runs_that_were_asked_other_prompts_are_no_comparison() -> None:
    """A sweep over data sets, each run with its own held-out conversations."""
    figures = {"held-out": {"accepted_length": 2.0, "lossless": True}}
    results = {
        name: {"inputs": {"the export": name, "the file of bench data set held-out": prompts},
               "average": 2.0, "datasets": figures}
        for name, prompts in (("one", "a"), ("two", "a"), ("three", "b"))
    }  # fmt: skip
    assert "NOT COMPARABLE" in ranking(results)
    del results["three"]
    assert "NOT COMPARABLE" not in ranking(results)


def test_the_engine_is_the_command_lines(two_runs: Config, tmp_path: Path) -> None:
    """What serves and how is asked of bench, not of the training; what a draft cannot do with it is
    refused for its run."""
    folder = Path(two_runs.paths.checkpoints) / "sweeps" / "s" / "train"
    two_runs.sweep = str(write_sweep(folder, [entry(0, "one")], tmp_path))
    engine, two_runs.engine = two_runs.engine, replace(
        two_runs.engine, name="openai", urls=["http://127.0.0.1:1"]
    )  # fmt: skip
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1.* cannot be reached"):
        bench_sweep(two_runs)
    two_runs.engine, two_runs.bench.verify = engine, "confidence"
    with pytest.raises(InputError, match=r"one: bench\.verify=confidence: draft=eagle3 has no"):
        bench_sweep(two_runs)


def test_a_run_that_fails_does_not_end_the_others(
    two_runs: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checkpoints = Path(two_runs.paths.checkpoints)
    shutil.rmtree(next((checkpoints / "one").glob("step-*")))
    shutil.copytree(checkpoints / "two", checkpoints / "old")
    made = json.loads((checkpoints / "old" / "run.json").read_text())
    made["config"]["draft"]["from_another_time"] = 3
    del made["sha256"]
    (checkpoints / "old" / "run.json").write_text(json.dumps(made))
    runs = [entry(0, "one"), entry(1, "away"), entry(2, "old"), entry(3, "two")]
    two_runs.sweep = str(write_sweep(checkpoints / "sweeps" / "s" / "train", runs, tmp_path))

    def crashing_export(cfg: Config) -> Path:
        if cfg.run_name == "two" and not (checkpoints / "two" / "export").exists():
            export(cfg)
            raise RuntimeError("out of memory\nand more lines")
        return export(cfg)

    monkeypatch.setattr(module, "export", crashing_export)
    with pytest.raises(InputError) as error:
        bench_sweep(two_runs)
    message = str(error.value)
    assert message.startswith("4 of 4 runs could not be benched:")
    assert "one: " in message and "holds no checkpoint" in message
    assert f"modal-sweep pull --checkpoints {two_runs.sweep}" in message
    assert "from_another_time" in message and "another version" in message
    assert "two: out of memory\n" not in message and message.endswith("two: out of memory")
    with pytest.raises(InputError, match="3 of 4 runs"):
        bench_sweep(two_runs)
    assert (checkpoints / "two" / "bench.json").exists()
    assert "two " in capsys.readouterr().out.splitlines()[-1]


def test_the_script_benches_a_sweep(two_runs: Config, tmp_path: Path) -> None:
    """As a user types it, from another folder, with the sweep pulled from Modal and unfinished."""
    checkpoints = Path(two_runs.paths.checkpoints)
    folder = tmp_path / "elsewhere" / "sweep"
    runs = [entry(0, "one", run_dir="gone/one"), entry(1, "two", "running"), entry(2, "away")]
    write_sweep(folder, runs, tmp_path / "gone", state="running")
    pulled = folder / "modal" / "0" / "checkpoints" / "one"
    pulled.parent.mkdir(parents=True)
    (checkpoints / "one").rename(pulled)
    command = [
        str(ROOT / "bench.py"), f"sweep={folder}", "model=tiny", "data=synthetic",
        f"paths.checkpoints={tmp_path}/unused", f"paths.datasets={two_runs.paths.datasets}",
        "device=cpu", "threads=1", "bench.max_tokens=4", "bench.bootstrap=20",
    ]  # fmt: skip
    done = warm.run(command, cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert "1 of 2 runs could not be benched" in done.stderr
    assert "away: its folder is not here" in done.stderr
    assert json.loads((pulled / "bench.json").read_text())["average"] >= 1
    assert "1/2 one" in done.stdout and "\none " in done.stdout


def test_missing_and_strange_records_are_named(cfg: Config, tmp_path: Path) -> None:
    sweeps = Path(cfg.paths.checkpoints) / "sweeps"
    there = write_sweep(sweeps / "there" / "train", [], tmp_path)
    cfg.sweep = str(sweeps / "wrong" / "train")
    with pytest.raises(InputError, match=f"wrong/train holds no sweep.json.*{there}"):
        bench_sweep(cfg)
    with pytest.raises(InputError, match=f"there are: {there}"):
        read_sweep(sweeps / "wrong" / "train")
    assert read_sweep(there)["runs"] == []
    for name in ("there", str(sweeps / "there"), str(there), str(there / "sweep.json")):
        assert find_sweep(name, cfg.paths.checkpoints) == there
    cfg.sweep = "there"
    with pytest.raises(InputError, match=r"no run of .* is finished; go on with: python train.py"):
        bench_sweep(cfg)
    write_sweep(there, [], tmp_path, script="prep")
    with pytest.raises(InputError, match=r"a sweep of prep.py"):
        bench_sweep(cfg)
    write_sweep(there, [], tmp_path, version=2)
    with pytest.raises(InputError, match="version 2"):
        read_sweep(there)
    for content in ("{", "[]", "{}"):
        (there / "sweep.json").write_text(content)
        with pytest.raises(InputError, match=r"sweep\.json"):
            read_sweep(there)
    with pytest.raises(InputError, match="there is none below"):
        find_sweep("x", str(tmp_path / "nothing"))
