"""Files that survive a kill, errors in one line."""

import os
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException

from hydra_sweeps.records import Tail, first_line, reason, write_whole


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *arguments: (calls.append(name), function(*arguments))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    file = tmp_path / "folder" / "record.json"
    for text in ("old", "new"):
        write_whole(file, text)
        assert file.read_text() == text and list(file.parent.iterdir()) == [file]
    assert calls == ["fsync", "replace", "fsync"] * 2


def test_a_tail_takes_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = Tail(path)
    assert tail.whole_lines() == []
    path.write_text('{"step": 1}\nno json\n[1]\n{"st')
    assert tail.whole_lines() == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert tail.whole_lines() == [{"step": 2}]
    path.write_text('{"step": 9}\n')
    assert tail.whole_lines() == [{"step": 9}]
    assert Tail(None).whole_lines() == []


def test_a_tail_leaves_out_what_another_run_wrote(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text('{"step": 1}\n')
    added, anew = Tail(path, strange=True), Tail(path, strange=True)
    assert added.whole_lines() == anew.whole_lines() == []
    with path.open("a") as file:
        file.write('{"step": 2}\n')
    assert added.whole_lines() == [{"step": 1}, {"step": 2}]
    write_whole(path, '{"step": 1, "own": 1}\n{"step": 2}\n{"step": 3}\n')
    assert anew.whole_lines()[0] == {"step": 1, "own": 1}
    assert added.whole_lines()[0] == {"step": 1, "own": 1}


def test_errors_in_one_line() -> None:
    assert first_line(ValueError("\na b\nc")) == "a b"
    assert reason(ValueError("a\nb")) == "ValueError: a" and reason(ValueError()) == "ValueError"
    assert reason(HydraException("error: a")) == "a"
