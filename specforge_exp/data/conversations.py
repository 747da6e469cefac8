"""The conversation record, and reading and writing it as JSON lines.

    {"id": str, "conversations": [{"role": "system|user|assistant|tool", "content": str, ...}, ...]}

ShareGPT's from/value pairs and OpenAI's `messages` are accepted on input. `tools` of the record
and `tool_calls`, `reasoning_content` and `weight` of its messages stay.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from specforge_exp.errors import InputError

_NAMES = {
    "system": "system developer",
    "user": "user human",
    "assistant": "assistant gpt chatgpt bing bard model function_call tool_call",
    "tool": "tool function observation ipython tool_response function_response",
}
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
"""What data sets call the four roles."""
LISTS = ("conversations", "messages", "conversation")
IDS = ("id", "uuid", "prompt_id", "conversation_id")


class BadRecord(ValueError):
    """A record that is not a conversation; the message says why."""


def normalise(record: Any) -> dict[str, Any]:
    """One conversation in the project's form.

    Keeps extra keys of the record and of its messages (tool calls, categories). `tools` becomes a
    list, OpenAI's older `functions` too; a `system` text beside the messages becomes the first of
    them, `images` and the like `image`. A record without an id (see IDS) gets one from its content,
    so the same conversation always has the same id.

    Raises:
        BadRecord: it has no messages, an unknown role, content or a `system` that is not text,
            `tools` that are not a JSON list, a weight that is neither 0 nor 1, or options of a chat
            template.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"a {type(record).__name__} where an object was expected")
    list_key = next((key for key in LISTS if record.get(key)), None)
    if list_key is None:
        raise BadRecord("no `conversations` or `messages`")
    if not isinstance(record[list_key], list):
        raise BadRecord(f"`{list_key}` is not a list")
    messages = [normalise_message(message) for message in record[list_key]]
    named = next((key for key in IDS if record.get(key) is not None), "id")
    ours = ("id", "conversations", named, list_key)
    rest = {key: value for key, value in record.items() if key not in ours}
    if rest.get("chat_template_kwargs"):
        raise BadRecord("its own chat_template_kwargs; give model.chat_template_kwargs")
    functions = normalise_tools(rest.pop("functions", None))
    wrapped = [{"type": "function", "function": each} for each in functions]
    if tools := normalise_tools(rest.pop("tools", None)) or wrapped:
        rest["tools"] = tools
    for key in ("images", "videos", "audios"):
        if rest.get(key):
            rest["image"] = rest.pop(key)
    if system := rest.pop("system", None):
        if not isinstance(system, str):
            raise BadRecord("the `system` beside the messages is not text")
        if system.strip() and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    name = record.get(named)
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
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(f"unknown role {role!r}; valid: {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value")}
    if call := rest.pop("function_call", None):  # OpenAI's, before there were tools
        rest["tool_calls"] = [{"type": "function", "function": call}]
    if content is None and rest.get("tool_calls"):
        content = ""
    match content:
        case [{"type": "text", "text": str(text)}]:  # of several, templates make different things
            content = text
    if not isinstance(content, str):
        raise BadRecord(f"the content of a {role} message is not text")
    for name in ("weight", "loss"):  # OpenAI's and Mistral's word, and ms-swift's
        weight = rest.pop(name, None)
        if weight not in (None, 0, 1):
            raise BadRecord(f"the `{name}` of a message is neither 0 nor 1: {weight!r}")
        if weight == 0:
            rest["weight"] = 0
    if role in ("function_call", "tool_call") and (calls := called(content)):
        content, rest["tool_calls"] = "", calls
    return {"role": ROLES[role], "content": content, **rest}


def called(text: str) -> list[dict[str, Any]]:
    """ShareGPT's calls, `{"name": ..., "arguments": ...}` or a list of them; [] for other text."""
    try:
        content = json.loads(text)
    except ValueError:
        return []
    calls = content if isinstance(content, list) else [content]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def normalise_tools(tools: Any) -> list[Any]:
    """The tools of a record, given as a list, as one tool or as JSON; raises BadRecord."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except ValueError as error:
            raise BadRecord(f"`tools` is not JSON: {error}") from None
    tools = [tools] if isinstance(tools, dict) else tools or []
    if not isinstance(tools, list):
        raise BadRecord("`tools` is not a list")
    return tools


def content_id(messages: list[dict[str, Any]]) -> str:
    """A stable id made of the messages."""
    text = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode(value: Any, sort: bool = False) -> bytes:
    """A value as JSON in UTF-8, NaN and infinity as null; `sort` orders the keys.

    Raises:
        UnicodeEncodeError: it holds half of a surrogate pair.
        TypeError, ValueError, RecursionError: JSON has no such value.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS if sort else None)
    except TypeError:  # also integers above 64 bits, which are JSON all the same
        return json.dumps(value, sort_keys=sort, ensure_ascii=False).encode()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file that one of our stages wrote; InputError names file and line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield normalise(orjson.loads(line))
            except ValueError as error:
                raise InputError(f"{path}:{number}: {error}") from None


def asks_of(record: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The messages before each answer: what a model that answers for itself is asked in turn.

    The result of a tool, and what stands without a user's words, is for the recorded answer and
    left out.
    """
    asks: list[list[dict[str, Any]]] = [[]]
    for message in record["conversations"]:
        if message["role"] == "assistant":
            asks.append([])
        elif message["role"] != "tool":
            asks[-1].append(message)
    return [ask for ask in asks if any(message["role"] == "user" for message in ask)]
