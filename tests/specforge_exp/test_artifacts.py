"""Write-once artifacts: nothing half-written is ever taken for whole."""

import json
from pathlib import Path

import pytest

from specforge_exp.artifacts import Fingerprint, require, reusable, writing
from specforge_exp.config import Config
from specforge_exp.errors import InputError

ONE = Fingerprint({"the input": "abc"}, {"lr": 1, "names": ["a"]})
TWO = Fingerprint({"the input": "xyz"}, {"lr": 2, "names": ["a"]})


def make(folder: Path, cfg: Config, fingerprint: Fingerprint = ONE, text: str = "done") -> None:
    with writing(folder, fingerprint, cfg) as partial:
        (partial / "content").write_text(text)


def test_complete_is_reused_and_says_what_made_it(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    assert not reusable(folder / "run.json", ONE, False, "prep")
    make(folder, cfg)
    assert reusable(folder / "run.json", ONE, False, "prep")
    record = json.loads((folder / "run.json").read_text())
    assert set(record) >= {"command", "config", "git", "packages", "inputs", "settings", "seconds"}
    assert record["config"]["model"]["name"] == "tiny"
    assert not folder.with_name("thing.partial").exists()


def test_what_has_changed_is_named(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    make(folder, cfg)
    with pytest.raises(InputError) as caught:
        reusable(folder / "run.json", TWO, False, "prep")
    assert "lr was 1, now 2" in str(caught.value)
    assert "the input has changed" in str(caught.value)
    assert "names" not in str(caught.value).split(";")[0]
    assert "prep.force=true" in str(caught.value)
    assert not reusable(folder / "run.json", TWO, True, "prep")


def test_interrupted_leaves_no_artifact(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"

    def interrupted() -> None:
        with writing(folder, ONE, cfg) as partial:
            (partial / "content").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not folder.exists()
    make(folder, cfg)
    assert (folder / "content").read_text() == "done"


def test_a_failed_remake_keeps_the_old_one(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    make(folder, cfg, text="old")

    def fails() -> None:
        with writing(folder, TWO, cfg) as partial:
            (partial / "content").write_text("new")
            raise InputError("no")

    with pytest.raises(InputError):
        fails()
    assert (folder / "content").read_text() == "old"
    make(folder, cfg, TWO, "new")
    assert (folder / "content").read_text() == "new"
    assert not folder.with_name("thing.old").exists()


def test_partial_work_is_kept_only_for_the_same_inputs(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"

    def stopped(fingerprint: Fingerprint) -> list[str]:
        found: list[str] = []
        with pytest.raises(KeyboardInterrupt), writing(folder, fingerprint, cfg, resume=True) as p:
            found += [file.name for file in p.iterdir() if file.name != "begun.json"]
            (p / "journal").write_text("some")
            raise KeyboardInterrupt
        return found

    assert stopped(ONE) == []
    assert stopped(ONE) == ["journal"]
    assert stopped(TWO) == []


def test_full_disk_is_one_clear_line(tmp_path: Path, cfg: Config) -> None:
    """/dev/full answers every write with the real error of a full disk."""
    folder = tmp_path / "thing"
    make(folder, cfg, text="old")

    def fills() -> None:
        with writing(folder, TWO, cfg) as partial:
            (partial / "content").symlink_to("/dev/full")
            (partial / "content").write_text("x" * 100_000)

    with pytest.raises(InputError, match="disk is full"):
        fills()
    assert (folder / "content").read_text() == "old"


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("{")
    with pytest.raises(InputError, match=r"run\.json"):
        reusable(file, ONE, False, "prep")


def test_missing_input_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"python prep\.py"):
        require(tmp_path / "train.jsonl", "python prep.py")
