"""metrics.jsonl is the truth; W&B is a copy that may fail."""

import json
from pathlib import Path

import pytest

from specforge_exp.config import Config
from specforge_exp.tracking import Tracker, has_wandb_key, open_tracker


def test_lines_after_the_checkpoint_are_dropped(cfg: Config, tmp_path: Path) -> None:
    tracker = open_tracker(cfg, tmp_path, 0)
    for step in (1, 2, 3):
        tracker.log({"step": step, "loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = open_tracker(cfg, tmp_path, 2)
    again.log({"step": 3, "loss": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    open_tracker(cfg, tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


class Broken:
    def log(self, metrics: object, step: int) -> None:
        raise ConnectionError("no network")

    def finish(self) -> None:
        raise AssertionError("already given up")


def test_wandb_failing_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(tmp_path / "metrics.jsonl", Broken())
    tracker.log({"step": 1})
    tracker.log({"step": 2})
    tracker.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert caplog.text.count("no network") == 1


def test_key_is_looked_for_where_wandb_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_wandb_key()
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password x\n")
    netrc.chmod(0o600)
    assert has_wandb_key()
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_wandb_key()


def test_wandb_is_offline_without_a_key_and_resumes_its_id(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg.tracker.name = "wandb"
    ids = []
    for start in (0, 1):
        tracker = open_tracker(cfg, tmp_path, start)
        tracker.log({"step": start + 1, "loss": 1.0})
        ids.append(tracker.wandb_run.id)
        tracker.close()
    assert ids[0] == ids[1]
    assert list((tmp_path / "wandb").glob("offline-run-*"))
