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

from specforge_exp.errors import InputError, naming

_NAMES = {
    "system": "system developer",
    "user": "user human",
    "assistant": "assistant gpt chatgpt bing bard model function_call tool_call",
    "tool": "tool function observation ipython tool_response function_response",
}
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
"""What data sets call the four roles."""
CALLS = ("function_call", "tool_call")
"""Roles whose text is calls of tools."""
WEIGHTS = ("weight", "loss", "loss_weight", "loss_scale", "train")
"""Whether a message is learnt, as OpenAI, Mistral, ms-swift, LLaMA-Factory and axolotl say it."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")
"""Thoughts beside the words; the last two stand beside one of the others, which is read."""
LABELS = ("label", "kto_tag")
"""Whether the last answer is a good one, where every answer has a record of its own (KTO)."""
LISTS = ("conversations", "messages", "conversation")
IDS = ("id", "uuid", "prompt_id", "conversation_id")


class BadRecord(ValueError):
    """A record that is not a conversation; the message says why."""


def normalise(record: Any) -> dict[str, Any]:
    """One conversation in the project's form.

    Keeps extra keys of the record and of its messages (tool calls, categories). `tools` becomes a
    list, OpenAI's older `functions` too; a `system` text beside the messages becomes the first of
    them, a preference pair's `chosen` the last where nobody answers, `images` and the like `image`.
    A record without an id (see IDS) gets one from its content, so the same conversation always has
    the same id.

    Raises:
        BadRecord: it has no messages, an unknown role, content or a `system` that is not text,
            thoughts beside it that are not, `tools` that are not a JSON list, a weight that is
            neither 0 nor 1, a false label, or options of a chat template.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"a {type(record).__name__} where an object was expected")
    list_key = next((key for key in LISTS if record.get(key)), None)
    if list_key is None:
        raise BadRecord(f"no `conversations` or `messages`; it has {', '.join(record)}"[:200])
    if not isinstance(record[list_key], list):
        raise BadRecord(f"`{list_key}` is not a list")
    messages = normalise_messages(record[list_key])
    if record.get("chosen") and messages[-1]["role"] != "assistant":
        messages = normalise_messages(followed(messages, record["chosen"]))
    named = next((key for key in IDS if record.get(key) is not None), "id")
    ours = ("id", "conversations", "chosen", named, list_key)
    rest = {key: value for key, value in record.items() if key not in ours}
    refuse(rest, messages)
    functions = normalise_tools(rest.pop("functions", None))
    if tools := normalise_tools(rest.pop("tools", None)) or functions:
        rest["tools"] = tools
    for key in ("images", "videos", "audios"):
        if rest.get(key):
            rest["image"] = rest.pop(key)
    if system := rest.pop("system", None) or rest.pop("system_prompt", None):
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


def refuse(record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Raise BadRecord for what a record asks for and would not get."""
    if record.get("chat_template_kwargs"):
        raise BadRecord(
            "its own chat_template_kwargs; give model.chat_template_kwargs, and records without"
        )
    bad = next((name for name in LABELS if record.get(name) is False), None)
    if bad and messages[-1]["role"] == "assistant":
        raise BadRecord(f"`{bad}` is false; a record without that answer is read")


def normalise_messages(said: list[Any]) -> list[dict[str, Any]]:
    """Messages as role and content, calls of tools with the answer that they follow or are; raises
    BadRecord."""
    messages: list[dict[str, Any]] = []
    for raw in said:
        message = normalise_message(raw)
        call = raw.get("role", raw.get("from")) in CALLS and "tool_calls" in message
        before = messages[-1] if messages else {}
        if call and not message["content"] and before.get("role") == "assistant":
            calls = [*(before.get("tool_calls") or []), *message["tool_calls"]]
            before.update(message | {"content": before["content"], "tool_calls": calls})
        else:
            messages.append(message)
    return messages


def followed(asked: list[Any], answer: Any) -> list[Any]:
    """Messages and their answer: a text, a message, or messages, which may begin with the asked."""
    match answer:
        case str():
            answer = [{"role": "assistant", "content": answer}]
        case dict():
            answer = [answer]
    if not isinstance(answer, list) or not answer:
        raise BadRecord("its answer is no text and no message")
    first = normalise_message(answer[0])["role"]
    return answer if first in ("system", "user") else asked + answer


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
        case [{"type": "text", "text": str(text), **more}] if "train" not in more:
            content = text  # of several, templates make different things
    if not isinstance(content, str):
        raise BadRecord(f"the content of a {role} message is not text")
    refuse_parts(ROLES[role], rest)
    if rest.pop("train_detail", None):
        raise BadRecord("a `train_detail`; a message is learnt as a whole")
    for name in WEIGHTS:
        weight = rest.pop(name, None)
        if weight not in (None, 0, 1):
            raise BadRecord(f"the `{name}` of a message is neither 0 nor 1: {weight!r}")
        if weight == 0:
            rest["weight"] = 0
    if role in CALLS:
        before, mark, text = content.rpartition("</think>")
        if calls := called(text):
            content, rest["tool_calls"] = before + mark, calls
    return {"role": ROLES[role], "content": content, **rest}


def refuse_parts(role: str, message: dict[str, Any]) -> None:
    """Raise BadRecord for an answer's thoughts that are there as a list or an object alone: none
    would be taught."""
    thoughts = {n: message[n] for n in THOUGHTS if role == "assistant" and message.get(n)}
    parts = [name for name, told in thoughts.items() if isinstance(told, list | dict)]
    if parts and not any(isinstance(told, str) for told in thoughts.values()):
        raise BadRecord(f"the `{parts[0]}` of an assistant message is not text")


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
    try:
        if isinstance(tools, str):
            tools = json.loads(tools) if tools.strip() else []
        tools = [tools] if isinstance(tools, dict) else tools or []
        if not isinstance(tools, list):
            raise BadRecord("`tools` is not a list")
        return [normalise_tool(tool) for tool in tools]
    except json.JSONDecodeError as error:
        raise BadRecord(f"`tools` is not JSON: {error}") from None


def normalise_tool(given: Any) -> dict[str, Any]:
    """A tool as servers take and show it: `{"type": "function", "function": {"name": ...}}`."""
    tool = json.loads(given) if isinstance(given, str) else given
    if not isinstance(tool, dict):
        raise BadRecord("one of its `tools` is no object")
    if "name" in tool and "function" not in tool and tool.get("type", "function") == "function":
        bare = {key: value for key, value in tool.items() if key != "type"}
        tool = {"type": "function", "function": bare}
    match tool:
        case {"function": {"parameters": str(text)} as inner}:  # JSON, as tables keep it
            return {**tool, "function": {**inner, "parameters": json.loads(text)}}
    return tool


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
    with naming(path), path.open("rb") as file:
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
