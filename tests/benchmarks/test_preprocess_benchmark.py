"""The benchmark's own half: what it generates, and that it refuses to compare different work."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import REPOSITORY, TINY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/preprocess.py, which shares its name with the stage's script."""
    spec = importlib.util.spec_from_file_location("bench_pre", BENCHMARKS / "preprocess.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our arrays of a few generated conversations."""
    folder: Path = tmp_path_factory.mktemp("benchmark")
    data, out = folder / "train.jsonl", folder / "ours.npz"
    benchmark.write_data(data, benchmark.vocabulary_of(Path(TINY.path)), 12, seed=0)
    roles = [m["role"] for m in json.loads(data.read_text().splitlines()[0])["conversations"]]
    assert roles[:3] == ["system", "user", "assistant"]
    command = [sys.executable, "our_preprocess.py", "tokenise", str(data), TINY.path]
    done = subprocess.run(
        [*command, json.dumps({"max_length": 512, "vocab": 1024}), str(out)],
        cwd=BENCHMARKS, capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["conversations"] == result["kept"] == 12
    assert {"who", "what", "seconds", "cpu_s", "tokens"} <= set(result)
    return out


def test_only_the_line_break_after_a_turn_may_differ(benchmark: ModuleType, measured: Path) -> None:
    with np.load(measured) as arrays:
        ours = dict(arrays)
    ends = np.flatnonzero(ours["ends"] & ours["mask"])
    last = np.cumsum(ours["lengths"]) - 1
    theirs = ours["mask"].copy()
    theirs[np.setdiff1d(ends, last) + 1] = True
    other = measured.with_name("theirs.npz")
    np.savez(other, ids=ours["ids"], lengths=ours["lengths"], mask=theirs)
    benchmark.compare_masks(measured, other)
    theirs[0] = True
    np.savez(other, ids=ours["ids"], lengths=ours["lengths"], mask=theirs)
    with pytest.raises(SystemExit, match=r"1 of .* masks differ"):
        benchmark.compare_masks(measured, other)


def test_maps_must_cover_the_same(benchmark: ModuleType, measured: Path, tmp_path: Path) -> None:
    counts = np.array([5, 0, 3, 3])
    np.save(tmp_path / "counts.npy", counts)
    for name, ids in (("a", [0, 2]), ("b", [0, 3]), ("c", [2, 3])):
        np.savez(tmp_path / f"{name}.npz", t2d=np.isin(np.arange(4), ids))
    benchmark.compare_maps(tmp_path / "counts.npy", tmp_path / "a.npz", tmp_path / "b.npz")
    with pytest.raises(SystemExit, match="cover 8 and 6"):
        benchmark.compare_maps(tmp_path / "counts.npy", tmp_path / "a.npz", tmp_path / "c.npz")
