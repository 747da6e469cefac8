"""Files are whole or not there, and lines of JSON survive kills and neighbours."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modal_sweep.protocol.journal import Journal
from modal_sweep.protocol.records import append_lines, first_line, whole_lines, write_whole

APPEND = """
import sys
from pathlib import Path
from modal_sweep.protocol.records import append_lines
for number in range(30):
    append_lines(Path(sys.argv[1]), [{"by": sys.argv[2], "number": number, "text": "x" * 300_000}])
"""


def test_what_a_kill_left_of_a_file_goes_when_it_is_brought_again(tmp_path: Path) -> None:
    """Not what a living process writes, or one of another machine that writes to the same disk."""
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    done = subprocess.run(command, check=True, capture_output=True)
    gone, here = int(done.stdout), os.getppid()
    names = [f"a[1].txt.{gone}.partial", f"a[1].txt.{here}.partial", f"a1.txt.{gone}.partial"]
    names += ["a[1].txt.old.partial", f"a[1].txt.{2**70}.partial"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    write_whole(tmp_path / "a[1].txt", [b"whole"], durable=False)
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].txt", *names}
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    write_whole(tmp_path / "a[1].txt", [b"whole"], durable=False)
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].txt", *names[1:]}


def test_a_cut_last_line_is_left_out_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    assert whole_lines(path) == []
    append_lines(path, [{"a": 1}, {"a": 2}])
    path.write_bytes(path.read_bytes() + b'{"a": 3')
    assert whole_lines(path) == [b'{"a":1}', b'{"a":2}']
    append_lines(path, [{"a": 4}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"a": 1}, {"a": 2}, {"a": 4}
    ]  # fmt: skip


def test_two_processes_cut_no_line_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    commands = [[sys.executable, "-c", APPEND, str(path), name] for name in ("one", "two")]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    for name in ("one", "two"):
        assert [line["number"] for line in lines if line["by"] == name] == list(range(30))


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks(tmp_path: Path) -> None:
    """Nothing is refused there, and nothing lost."""
    append_lines(tmp_path / "lines.jsonl", [{"a": 1}])
    write_whole(tmp_path / "whole", [b"content"])
    assert whole_lines(tmp_path / "lines.jsonl") == [b'{"a":1}']
    with Journal(tmp_path).locked():
        pass


@pytest.mark.parametrize("durable", [True, False])
def test_what_cannot_be_written_leaves_what_was_there(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    write_whole(path, [b"first ", b"content"], durable)

    def broken() -> Iterator[bytes]:
        yield b"second"
        raise OSError("the connection is gone")

    with pytest.raises(OSError, match="connection"):
        write_whole(path, broken(), durable)
    assert path.read_bytes() == b"first content"


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n a reason\nand more")) == "a reason"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert first_line("") == ""


def test_what_a_terminal_has_no_letter_for_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    command = [sys.executable, "-m", "modal_sweep", "list", str(tmp_path / "τ")]
    assert "\\u03c4" in subprocess.run(command, check=False, capture_output=True, text=True).stdout
