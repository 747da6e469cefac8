"""A conversation and its /commands."""

import json
from pathlib import Path
from typing import Any

import pytest

from specforge_exp.chat.dialogue import Dialogue, Piece, Spoken
from specforge_exp.chat.terminal import question
from specforge_exp.config import ChatConfig
from specforge_exp.data.conversations import read_jsonl
from specforge_exp.errors import InputError

TALK = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well, thanks: ünwell → well."},
]


@pytest.fixture
def dialogue() -> Dialogue:
    return Dialogue("m", ChatConfig(system="Be brief."), [*TALK])


def test_settings(dialogue: Dialogue) -> None:
    assert dialogue.obey("/temperature 0") == dialogue.obey("/temperature") == "temperature 0"
    assert dialogue.obey("/top_p 0.5") == dialogue.obey("/top_p  ") == "top_p 0.5"
    assert (dialogue.settings.temperature, dialogue.settings.top_p) == (0.0, 0.5)
    assert dialogue.whole == [{"role": "system", "content": "Be brief."}, *TALK]
    assert dialogue.obey("/system Be long, be kind.") == "system: Be long, be kind."
    assert dialogue.whole[0]["content"] == "Be long, be kind."
    assert dialogue.obey("/system") == "system: none"
    assert dialogue.whole == TALK
    dialogue.obey("/system Stay.")
    dialogue.obey("/reset")
    assert dialogue.whole == [{"role": "system", "content": "Stay."}]
    for word in ("/reset", "/system", "/temperature", "/top_p", "/save", "/load", "Ctrl-C"):
        assert word in dialogue.obey("/help")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/temperature hot", "no number: .*hot"),
        ("/temperature -1", "temperature=-1.0 must be at least 0"),
        ("/temperature nan", "must be a finite number"),
        ("/temperature inf", "must be a finite number"),
        ("/top_p 0", r"must be in \(0, 1\]"),
        ("/top_p 1.5", r"must be in \(0, 1\]"),
        ("/tempo 3", "/tempo 3 is no command; /help lists them"),
        ("/save", "/save is no command"),
        ("/save /proc/none/x", "No such file"),
        ("/load", "/load is no command"),
        ("/load /none/x.jsonl", "No such file"),
        ("/load /tmp", "Is a directory"),
    ],
)
def test_what_is_refused_changes_nothing(dialogue: Dialogue, line: str, reason: str) -> None:
    before = vars(dialogue).copy()
    with pytest.raises((InputError, OSError), match=reason):
        dialogue.obey(line)
    assert vars(dialogue) == before


def test_a_saved_conversation_is_loaded_and_is_data(dialogue: Dialogue, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    assert dialogue.obey(f"/save {path}") == f"{path}: 2 messages"
    [record] = read_jsonl(path)
    assert record["conversations"] == dialogue.whole
    other = Dialogue("n", ChatConfig(temperature=0.0, top_p=0.5))
    told = "\n".join(["> How are you?", TALK[1]["content"], f"{path}: 2 messages"])
    assert other.obey(f"/load {path}") == told
    assert vars(other) == vars(dialogue) | {"model": "n"}
    other.messages += TALK
    other.obey(f"/save {path}")  # where it comes from
    assert len(next(read_jsonl(path))["conversations"]) == 5


def test_no_other_file_is_overwritten(dialogue: Dialogue, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("precious")
    with pytest.raises(InputError, match="is there already"):
        dialogue.obey(f"/save {path}")
    dialogue.obey(f"/save {tmp_path / 'other'}")
    dialogue.obey("/reset")
    with pytest.raises(InputError, match="is there already"):  # another conversation by now
        dialogue.obey(f"/save {tmp_path / 'other'}")
    with pytest.raises(InputError, match="nothing was said"):
        dialogue.obey(f"/save {tmp_path / 'new'}")
    assert path.read_text() == "precious" and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no conversation with an answer"),
        (b"\xff\xfe", ":1: "),
        (b"[1]", "where an object was expected"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no conversation with an answer"),
        (b'{"messages": [{"role": "assistant", "content": "x"}], "top_p": 7}', "top_p=7.0 must"),
        (b'{"messages": [{"role": "assistant", "content": "x"}], "top_p": []}', "no number"),
    ],
)
def test_a_file_that_is_no_chat(
    dialogue: Dialogue, tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(content)
    before = vars(dialogue).copy()
    with pytest.raises(InputError, match=reason):
        dialogue.obey(f"/load {path}")
    assert vars(dialogue) == before


def test_a_question_at_the_end_is_left_out(dialogue: Dialogue, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    extra = {"role": "user", "content": "And?"}
    path.write_text(json.dumps({"messages": [*TALK, extra]}))
    assert "2 messages" in dialogue.obey(f"/load {path}")
    assert dialogue.whole == TALK


@pytest.mark.parametrize("more", ["another conversation", "a call", "a question", "a category"])
def test_a_file_that_says_more_is_not_written_over(
    dialogue: Dialogue, tmp_path: Path, more: str
) -> None:
    """What was left out is named; the file stays as it is."""
    path = tmp_path / "data.jsonl"
    talk: list[dict[str, Any]] = [*TALK]
    if more == "a call":
        call = {"function": {"name": "clock", "arguments": {}}}
        talk[-1] = talk[-1] | {"tool_calls": [call], "reasoning_content": "Hm."}
    elif more == "a question":
        talk.append({"role": "user", "content": "And?"})
    record: dict[str, Any] = {"messages": talk}
    if more == "a category":
        record["category"] = "x"
    lines = [json.dumps(record)] * (1 + (more == "another conversation"))
    path.write_text("\n".join(lines))
    told = dialogue.obey(f"/load {path}").splitlines()[-1]
    names = {
        "a call": ", without reasoning_content, tool_calls", "a category": ", without category",
    }  # fmt: skip
    assert told == f"{path}: 2 messages{names.get(more, '')}"
    with pytest.raises(InputError, match="is there already"):
        dialogue.obey(f"/save {path}")


def test_status() -> None:
    spoken = Spoken([Piece("thinks", "thought"), Piece("a"), Piece("b", "drafted")])
    assert spoken.text == "ab"
    spoken.tokens, spoken.seconds, spoken.first_seconds = 11, 3.0, 1.0
    assert spoken.status() == "5 tokens/s · 11 tokens"
    spoken.gained, spoken.end = [3, 4], "stopped"
    assert spoken.status() == "τ 3.50 · 5 tokens/s · 11 tokens · stopped"
    assert Spoken().status() == "0 tokens"


def test_half_characters_of_a_terminal(dialogue: Dialogue, tmp_path: Path) -> None:
    assert question(" a\udce4b ü\n") == {"role": "user", "content": "a?b ü"}
    dialogue.obey("/system a\udce4b ü")
    assert dialogue.obey(f"/save {tmp_path / 'x'}") and dialogue.settings.system == "a?b ü"
