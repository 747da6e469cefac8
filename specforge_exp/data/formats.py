"""From a raw record to a conversation: one function per `format` of a source."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from specforge_exp.data.conversations import IDS, LISTS, BadRecord, encode, followed, normalise
from specforge_exp.data.files import RAW_CHARACTERS, Columns, Raw, Rejected

MARKS = re.compile("<(image|video|audio)>")
MORE = (
    "system system_prompt tools functions chat_template_kwargs chosen label kto_tag "
    "image images videos audios url source"
)
"""Columns that are kept beside a conversation or tell what it means."""

Record = dict[str, Any]


def convert(item: Raw, adapt: Callable[[Any], Any]) -> Record | Rejected:
    """One raw record as a conversation that a JSON-lines file can hold, or why it is none."""
    where, value = item
    try:
        record = normalise(adapt(value))
        if not any(m["role"] == "user" and m["content"].strip() for m in record["conversations"]):
            raise BadRecord("no user message")
        encode(record)
        return record
    except UnicodeEncodeError:
        reason = "half of a surrogate pair: its text is no valid Unicode"
    except BadRecord as error:
        reason = str(error)
    except (ValueError, TypeError, RecursionError) as error:
        reason = f"cannot be written as JSON: {error}"
    return Rejected(where, reason, json.dumps(value, default=str)[:RAW_CHARACTERS])


def as_it_is(value: Any) -> Any:
    """format=conversations: the record is one."""
    return value


def image(value: Any) -> Any:
    """format=image: conversations about a picture; the `<image>` marks and the like leave the text.

    What `image` says of the picture (a path, a URL) stays in the record.
    """
    if not isinstance(value, dict):
        return value
    lists = {key: value[key] for key in LISTS if isinstance(value.get(key), list)}
    return value | {key: list(map(without_marks, messages)) for key, messages in lists.items()}


def without_marks(message: Any) -> Any:
    """A message about a picture, as text."""
    if not isinstance(message, dict):
        return message
    marked = {k: v for k, v in message.items() if isinstance(v, str) and MARKS.search(v)}
    return message | {key: MARKS.sub("", text).strip() for key, text in marked.items()}


def instruction(value: Any) -> Record:
    """format=instruction: Alpaca's `instruction` (and `input`), and `output` or `response`."""
    asks = text_of(value, "instruction")
    for name in ("input", "context"):
        more = value.get(name)
        if not isinstance(more, str | None):
            raise BadRecord(f"`{name}` is not text")
        if more and more.strip():
            asks += "\n\n" + more
    answer = text_of(value, "output", "response", "chosen")
    return beside(value) | {"conversations": followed([*earlier(value), user(asks)], answer)}


ASKS = ("prompt", "input", "query", "question")
ANSWERS = ("completion", "chosen", "response", "output")
PARTS = ("context", "choices", "options", "article")
"""What a question may lean on, each in another way."""


def prompt(value: Any) -> Record:
    """format=prompt: one of ASKS and one of ANSWERS or none, each a text or messages."""
    if not isinstance(value, dict):
        raise BadRecord(f"a {type(value).__name__} where an object was expected")
    asks, answers = ([key for key in keys if value.get(key)] for keys in (ASKS, ANSWERS))
    for given in (asks, answers):
        if len(given) > 1:
            raise BadRecord(f"several of one kind; `{'`, `'.join(given)}`")
    if part := next((key for key in PARTS if value.get(key)), None):
        raise BadRecord(f"`{part}` is not read; put its words into the prompt")
    asked = value[asks[0]] if asks else []
    if not isinstance(asked, str | list) or not (asks or answers):
        raise BadRecord(f"no {' or '.join(f'`{key}`' for key in ASKS)}, text or messages")
    talk = [*earlier(value), *([user(asked)] if isinstance(asked, str) else asked)]
    if answers:
        talk = followed(talk, value[answers[0]])
    return beside(value) | {"conversations": talk}


def beside(value: Record) -> Record:
    """What is kept of a record besides its question and answer."""
    return {key: value[key] for key in (*IDS, *MORE.split()) if key in value}


def earlier(value: Record) -> list[Record]:
    """The messages of `history`: pairs of a question and its answer."""
    pairs = value.get("history") or []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRecord("`history` is no list of pairs")
    return [message for asked, said in pairs for message in followed([user(asked)], said)]


def humaneval(value: Any) -> Record:
    """format=humaneval: one user message that asks to complete the function of `prompt`."""
    code = text_of(value, "prompt").strip()
    question = user(f"Complete this Python function:\n\n```python\n{code}\n```")
    name = {"id": value["task_id"]} if "task_id" in value else {}
    return name | {"conversations": [question]}


def gsm8k(value: Any) -> Record:
    """format=gsm8k: one user message with the `question` (or `prompt`)."""
    question = user(text_of(value, "question", "prompt").strip())
    name = {"id": value["id"]} if "id" in value else {}
    return name | {"conversations": [question]}


REASON = "\nPlease reason step by step, and put your final answer within \\boxed{}."
SOLVE = "Write a solution to the following problem and make sure that it passes the tests:"
EXPERT = (
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests. "
    "You will NOT return anything except for the program"
)


def math(value: Any) -> list[str]:
    """format=math: GSM8K, MATH-500, AIME."""
    return [text_of(value, "question", "problem") + REASON]


def solve(value: Any) -> list[str]:
    """format=solve: HumanEval, not as format=humaneval asks it."""
    return [f"{SOLVE}\n```python\n{text_of(value, 'prompt')}\n```"]


def mbpp(value: Any) -> list[str]:
    """format=mbpp: the `prompt` of its sanitized configuration."""
    return [text_of(value, "prompt")]


def livecodebench(value: Any) -> list[str]:
    """format=livecodebench: with its starter code, where it has some."""
    question, code = text_of(value, "question_content"), value.get("starter_code")
    how = "Use the following code structure" if code else "Write your code in the following format"
    return [
        f"{EXPERT}\n\n### Question:\n{question}\n\n### Format: {how}:\n```python\n"
        f"{code or '# YOUR CODE HERE'}\n```\n\n"
        "### Answer: (use the provided format with backticks)"
    ]


def swe_bench(value: Any) -> list[str]:
    """format=swe-bench: the issue alone, without its repository."""
    asks = text_of(value, "problem_statement")
    return [f"Problem Statement:\n{asks}\nPlease fix the issue described above."]


def mt_bench(value: Any) -> list[str]:
    """format=mt-bench: one turn per text of `prompt` or, in the files of FastChat, `turns`."""
    asks = value.get("prompt", value.get("turns")) if isinstance(value, dict) else None
    if not (isinstance(asks, list) and asks and all(isinstance(text, str) for text in asks)):
        raise BadRecord("no `prompt` list of texts (or `turns`)")
    return asks


def alpaca(value: Any) -> list[str]:
    """format=alpaca: `instruction` and `input`, without the answer."""
    asks, more = text_of(value, "instruction"), value.get("input")
    return [f"{asks}\n\nInput:\n{more}" if more else asks]


def prompts(texts: Callable[[Any], list[str]]) -> Callable[[Any], Any]:
    """A format that has questions only: between two of them stands an empty answer."""

    def task(value: Any) -> Record:
        gap = {"role": "assistant", "content": ""}
        messages = [message for text in texts(value) for message in (gap, user(text))]
        return {key: value[key] for key in IDS if key in value} | {"conversations": messages[1:]}

    return task


def text_of(value: Any, *keys: str) -> str:
    """The first of `keys` that holds text; raises BadRecord when none does."""
    if isinstance(value, dict):
        for key in keys:
            if isinstance(value.get(key), str):
                return str(value[key])
    raise BadRecord(f"no {' or '.join(f'`{key}`' for key in keys)} text")


def user(text: str) -> Record:
    """A user message."""
    return {"role": "user", "content": text}


class Format(NamedTuple):
    """How the records of a source read."""

    adapt: Callable[[Any], Any]
    """Turns a raw record into one that `conversations.normalise` takes."""
    columns: Columns
    """What is read of a table."""


DIALOG = Columns(" ".join(LISTS), MORE)
FORMATS = {
    "conversations": Format(as_it_is, DIALOG),
    "image": Format(image, DIALOG),
    "instruction": Format(
        instruction, Columns("instruction", f"input context output response history {MORE}")
    ),
    "prompt": Format(
        prompt, Columns(" ".join([*ASKS, "chosen"]), " ".join([*ANSWERS, *PARTS, "history", MORE]))
    ),
    "humaneval": Format(humaneval, Columns("prompt", "task_id")),
    "gsm8k": Format(gsm8k, Columns("question prompt")),
    "math": Format(prompts(math), Columns("question problem")),
    "solve": Format(prompts(solve), Columns("prompt")),
    "mbpp": Format(prompts(mbpp), Columns("prompt")),
    "livecodebench": Format(prompts(livecodebench), Columns("question_content", "starter_code")),
    "swe-bench": Format(prompts(swe_bench), Columns("problem_statement")),
    "mt-bench": Format(prompts(mt_bench), Columns("prompt turns")),
    "alpaca": Format(prompts(alpaca), Columns("instruction", "input")),
}
