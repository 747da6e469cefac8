"""The conversation record, and reading and writing it as JSON lines.

    {"id": str, "conversations": [{"role": "system|user|assistant|tool", "content": str, ...}, ...]}

ShareGPT's from/value pairs and OpenAI's `messages` are accepted on input.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from specforge_exp.errors import InputError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


class BadRecord(ValueError):
    """A record that is not a conversation; the message says why."""


def normalise(record: Any) -> dict[str, Any]:
    """One conversation in the project's form.

    Keeps extra keys of the record and of its messages (tool calls, categories). A record without
    an id gets one from its content, so the same conversation always has the same id.

    Raises:
        BadRecord: it has no messages, an unknown role or content that is not text.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"a {type(record).__name__} where an object was expected")
    found = next((key for key in ("conversations", "messages") if record.get(key)), None)
    if found is None:
        raise BadRecord("no `conversations` or `messages`")
    if not isinstance(record[found], list):
        raise BadRecord(f"`{found}` is not a list")
    messages = [normalise_message(message) for message in record[found]]
    rest = {key: value for key, value in record.items() if key not in ("id", found)}
    name = record.get("id")
    return {
        "id": content_id(messages) if name is None else str(name),
        "conversations": messages,
        **rest,
    }


def normalise_message(message: Any) -> dict[str, Any]:
    """One message as role and content; raises BadRecord."""
    if not isinstance(message, dict):
        raise BadRecord("a message is not an object")
    role = message.get("role", message.get("from"))
    if role not in ROLES:
        raise BadRecord(f"unknown role {role!r}; valid: {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRecord(f"the content of a {role} message is not text")
    rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value")}
    return {"role": ROLES[role], "content": content, **rest}


def content_id(messages: list[dict[str, Any]]) -> str:
    """A stable id made of the messages."""
    text = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object per line; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file that one of our stages wrote; InputError names file and line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield normalise(json.loads(line))
            except ValueError as error:
                raise InputError(f"{path}:{number}: {error}") from None


def prompt_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages up to the first assistant turn: what a model is asked."""
    messages = []
    for message in record["conversations"]:
        if message["role"] == "assistant":
            break
        messages.append(message)
    return messages
