"""The six commands, as a user types them."""

import json
import logging
import subprocess
from pathlib import Path
from pkgutil import resolve_name

import pytest
import warm
from conftest import REPOSITORY
from test_conf import composed

STAGES = ["prep", "regen", "preprocess", "train", "export", "bench"]


def options(folder: Path) -> list[str]:
    """A small run with everything in a folder."""
    roots = [f"paths.{name}={folder / name}" for name in ("datasets", "checkpoints")]
    return ["experiment=smoke", "model=tiny", *roots]


def run(stage: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return warm.run([str(REPOSITORY / f"{stage}.py"), *options(folder), *overrides], cwd=folder)


@pytest.mark.slow
def test_six_commands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Out of order: the missing input is named. In order: a table. Again, here: reused."""
    early = run("bench", tmp_path)
    assert early.returncode == 1
    assert f"python {REPOSITORY / 'export.py'}" in early.stderr
    assert "Traceback" not in early.stderr
    for stage in STAGES:
        done = run(stage, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr, "a progress bar where there is no terminal"
    assert "lossless" in done.stdout
    result = json.loads(
        (tmp_path / "checkpoints" / "smoke_tiny_full-opd" / "bench.json").read_text()
    )
    assert result["datasets"]["held-out"]["lossless"] is True
    records = tmp_path / "checkpoints" / "smoke_tiny_full-opd" / ".hydra"
    assert {folder.name for folder in records.iterdir()} == {"train", "export", "bench"}
    caplog.set_level(logging.INFO)
    for stage in STAGES:
        caplog.clear()
        resolve_name(f"specforge_exp.stages.{stage}:{stage}")(composed(*options(tmp_path)))
        assert "complete, reused" in caplog.text
    changed = run("train", tmp_path, "lr=5e-4")
    assert changed.returncode == 1
    assert "lr was 0.001, now 0.0005" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_a_bad_line_is_reported_with_its_place(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    good = '{"messages": [{"role": "user", "content": "Describe a lamp."}]}\n'
    source.write_text(good + '{"messages": [\n' + good.replace("lamp", "kettle"))
    done = run("prep", tmp_path, f"data.train=[{{path: {source}}}]", "data.eval=[]")
    assert done.returncode == 0, done.stderr
    assert f"{source}:2" in done.stdout + done.stderr
    assert "rejected 1" in done.stdout + done.stderr
