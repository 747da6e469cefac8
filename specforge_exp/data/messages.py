"""Messages as servers hand them to a chat template: thoughts, tool calls and the system's words."""

import json
import re
from typing import Any

THOUGHTS = re.compile(r"(\s*(?:<think>)?)((?:(?!<think>).)*?)(</think>\s*)", re.DOTALL)
"""Thoughts in front of an answer; a template that opens them leaves only their end to the model."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which servers and data sets hand over thoughts; the first one with text counts."""
ARGUMENTS = ("parameters", "input", "args", "kwargs")
"""What others call the arguments of a call; templates read none of them."""

MARKS = (
    ("<think>\n", "\n</think>\n\n"),
    ("<|channel>thought\n", "\n<channel|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>\n"),
)
"""How models write the beginning and the end of their thoughts; the first where a template has
none of its own."""

Message = dict[str, Any]


class Unrenderable(ValueError):
    """The conversation does not fit the model's chat template; the message says why."""


def parsed(value: Any, what: str) -> Any:
    """The value, read from JSON when it is text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise Unrenderable(f"its {what} are no JSON") from None


def split_thoughts(content: str) -> tuple[str, str, str, str]:
    """Opening, thoughts, closing and answer, which make up the content; without thoughts ""."""
    match = THOUGHTS.match(content) if "</think>" in content else None
    if not match:
        return "", "", "", content
    return match[1], match[2], match[3], content[match.end() :]


def reasoning_of(message: Message) -> str:
    """Thoughts that stand beside the content, under whichever key; "" without."""
    texts = (message.get(key) for key in REASONING)
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def is_given(message: Message) -> bool:
    """Whether an answer stays as the data has it when the target answers: results follow the call
    of a tool, and what is not to be learnt (weight 0) is there for what follows it."""
    return bool(message.get("tool_calls")) or message.get("weight") == 0


def readable(message: Message, thinking: str) -> Message:
    """The message as servers hand it to the template: tool calls parsed, thoughts in or out."""
    if not message.get("tool_calls", True):  # templates ask whether it is there
        message = {key: value for key, value in message.items() if key != "tool_calls"}
    if message["role"] != "assistant":
        return message
    calls = parsed(message.get("tool_calls"), "tool calls")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise Unrenderable("its tool calls are no list of objects")
        message = {**message, "tool_calls": [readable_call(call) for call in calls]}
    thoughts = reasoning_of(message)
    message = {key: value for key, value in message.items() if key not in REASONING}
    if thinking == "out":
        answer = split_thoughts(message["content"])[3]
        if answer.lstrip().startswith("<think>"):
            raise Unrenderable("an answer is nothing but thoughts")
        return {**message, "content": answer}
    # Templates read the first, of which transformers makes the third, or the second, as vLLM gives.
    return message | (dict.fromkeys(REASONING[:2], thoughts) if thoughts else {})


def readable_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, as servers give it to templates."""
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise Unrenderable("a tool call has no name")
    arguments: Any = inner.get("arguments")
    for _ in range(2):  # data that were JSON before they were put into JSON
        arguments = parsed(arguments or {}, "tool call's arguments") or {}
    if not isinstance(arguments, dict):
        raise Unrenderable("a tool call's arguments are no object")
    if other := next((name for name in ARGUMENTS if inner.get(name) and not arguments), None):
        raise Unrenderable(f"a tool call has `{other}` for `arguments`")
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def joined(messages: list[Message]) -> list[Message]:
    """The same without a system message: its words stand before those of the first user turn."""
    if len(messages) < 2 or [m["role"] for m in messages[:2]] != ["system", "user"]:
        return messages
    words = f"{messages[0]['content'].rstrip()}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": words}, *messages[2:]]
