"""From a raw record to a conversation: one function per `format` of a source."""

import json
from collections.abc import Callable
from typing import Any

from specforge_exp.conversations import BadRecord, normalise
from specforge_exp.sources.files import RAW_CHARACTERS, Raw, Rejected

QUESTION_WORDS = "what how why who where when which".split()
QUESTION_LENGTH = 8

Record = dict[str, Any]


def convert(item: Raw, adapt: Callable[[Any], Any]) -> Record | Rejected:
    """One raw record as a conversation that a JSON-lines file can hold, or why it is none."""
    where, value = item
    try:
        record = normalise(adapt(value))
        if not any(m["role"] == "user" and m["content"].strip() for m in record["conversations"]):
            raise BadRecord("no user message")
        json.dumps(record, ensure_ascii=False).encode()
        return record
    except UnicodeEncodeError:
        reason = "half of a surrogate pair: its text is no valid Unicode"
    except BadRecord as error:
        reason = str(error)
    except (ValueError, TypeError, RecursionError) as error:
        reason = f"cannot be written as JSON: {error}"
    raw = json.dumps(value, default=str) if not isinstance(value, str) else value
    return Rejected(where, reason, raw[:RAW_CHARACTERS])


def as_it_is() -> Callable[[Any], Any]:
    """format=conversations: the record is one."""
    return lambda value: value


def chitchat() -> Callable[[Any], Any]:
    """format=chitchat: one question of each dialog of PyPI's chitchat-dataset, to be answered.

    The question is the dialog's first message of at least QUESTION_LENGTH words that begins with
    one of QUESTION_WORDS and ends with a question mark. Most dialogs open with a greeting or with
    an answer to a topic that is not part of them; those are nothing to ask a model. A question
    that an earlier dialog asked (in any case) is rejected, so that skip and limit part disjoint
    sets.
    """
    seen: set[str] = set()

    def question(value: Any) -> Record:
        try:
            texts = [message["text"].strip() for turn in value["messages"] for message in turn]
        except (TypeError, KeyError, AttributeError):
            raise BadRecord("not a chitchat dialog: no `messages` of {text} lists") from None
        found = next((text for text in texts if is_question(text)), None)
        if found is None:
            raise BadRecord(f"no question of {QUESTION_LENGTH} words")
        if found.casefold() in seen:
            raise BadRecord("the question of an earlier dialog")
        seen.add(found.casefold())
        return asked(found)

    return question


def is_question(text: str) -> bool:
    """True for a message that asks something on its own; see `chitchat`."""
    words = text.split()
    opening = words[0].casefold().strip(",'") if words else ""
    return len(words) >= QUESTION_LENGTH and text.endswith("?") and opening in QUESTION_WORDS


def humaneval() -> Callable[[Any], Any]:
    """format=humaneval: one user message that asks to complete the function of `prompt`."""

    def task(value: Any) -> Record:
        code = text_of(value, "prompt").strip()
        name = {"id": value["task_id"]} if "task_id" in value else {}
        return name | asked(f"Complete this Python function:\n\n```python\n{code}\n```")

    return task


def gsm8k() -> Callable[[Any], Any]:
    """format=gsm8k: one user message with the `question` (or `prompt`)."""

    def task(value: Any) -> Record:
        name = {"id": value["id"]} if isinstance(value, dict) and "id" in value else {}
        return name | asked(text_of(value, "question", "prompt").strip())

    return task


def text_of(value: Any, *keys: str) -> str:
    """The first of `keys` that holds text; raises BadRecord when none does."""
    if isinstance(value, dict):
        for key in keys:
            if isinstance(value.get(key), str):
                return str(value[key])
    raise BadRecord(f"no {' or '.join(f'`{key}`' for key in keys)} text")


def asked(text: str) -> Record:
    """A conversation of one user message."""
    return {"conversations": [{"role": "user", "content": text}]}


FORMATS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "conversations": as_it_is,
    "chitchat": chitchat,
    "humaneval": humaneval,
    "gsm8k": gsm8k,
}
