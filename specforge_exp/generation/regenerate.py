"""One conversation, answered turn by turn; system, user and tool turns stay as they are."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from specforge_exp.data.messages import Unrenderable, is_given, reasoning_of, split_thoughts
from specforge_exp.generation.engine import Answer, Failed, Message, Refused, Request, Sampling

Record = dict[str, Any]
Ask = Callable[[Request], Awaitable[Answer]]
TEMPLATE_BYTES = 64
"""More than a chat template adds to a message, in tokens."""


READ = ("<think>", "</think>")
"""Marks that `sort_thoughts` and preprocess read themselves."""


@dataclass(frozen=True)
class Rules:
    """How answers are asked for, and what becomes of them."""

    sampling: Sampling
    max_length: int
    """Tokens of a conversation: one that has so many gets no further answer."""
    count: Callable[[Record, list[Message]], int] | None
    """Tokens of a request; None when there is no tokenizer to count with."""
    template_kwargs: dict[str, Any]
    thinking: str
    """See regen.thinking."""
    truncated: str
    """See regen.truncated."""
    seed: int
    attempts: int
    """Attempts at an answer that comes back empty."""
    made_by: dict[str, Any]
    """What each record says of its origin: model, revision, engine, sampling."""
    marks: tuple[str, ...] = ()
    """Special tokens around thoughts and answers, which a server has to read: `turns.own_marks`."""


@dataclass(frozen=True)
class Item:
    """One conversation to be regenerated."""

    record: Record
    sample: int = 0
    """Number of this answer to it."""
    server: int = 0
    """The engine's server that has its beginning in the cache."""


class Stop(Exception):
    """No further answers; those before count, and without any the conversation has failed."""


async def regenerate(item: Item, rules: Rules, ask: Ask) -> Record:
    """The conversation with the target's own answers, or as it was with the reason as `error`.

    A conversation that ends with a user turn gets one more answer. Answers that call tools stay, as
    the results that follow belong to them, and those with weight 0, which nothing learns.
    """
    record = item.record
    turns = list(record["conversations"])
    if turns and turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    messages: list[Message] = []
    answers: list[Answer] = []
    try:
        for turn in turns:
            if turn["role"] != "assistant" or is_given(turn):
                messages.append(turn)
                continue
            answers.append(await one_answer(item, messages, rules, ask, answers))
            messages.append(answers[-1].message)
            if answers[-1].finish_reason == "tool_calls":
                raise Stop("it calls a tool, whose result nobody knows")
    except (Stop, Refused, Unrenderable, Failed) as error:
        if not answers or isinstance(error, Failed):
            return {"error": str(error), **record}
        while messages[-1] is not answers[-1].message:
            messages.pop()
    if not answers:
        return {"error": "nothing to answer: only calls of tools or weights of 0", **record}
    return {
        **record,
        "conversations": messages,
        "finish_reasons": [answer.finish_reason for answer in answers],
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "generated_tokens": sum(answer.completion_tokens for answer in answers),
        # With the zone: a server of this machine tells its template the day here.
        "regenerated": {
            **rules.made_by, "time": datetime.now().astimezone().isoformat(timespec="seconds")
        },
    }  # fmt: skip


async def one_answer(
    item: Item, messages: list[Message], rules: Rules, ask: Ask, before: list[Answer]
) -> Answer:
    """The next answer; raises Stop, Refused, Unrenderable or Failed."""
    record = item.record
    check_room(record, messages, rules, before)
    for attempt in range(rules.attempts):
        name = f"{rules.seed}/{record['id']}/{item.sample}/{len(before)}/{attempt}"
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) >> 1
        request = Request(
            messages=list(messages), sampling=rules.sampling, seed=seed, tools=record.get("tools"),
            template_kwargs=rules.template_kwargs, session=f"{record['id']}/{item.sample}",
            server=item.server, special_tokens=bool(rules.marks),
        )  # fmt: skip
        answer = await ask(request)
        if answer.finish_reason == "length" and rules.truncated == "retry":
            longer = replace(rules.sampling, max_tokens=2 * rules.sampling.max_tokens)
            answer = await ask(replace(request, sampling=longer))
        if unread := [m for m in rules.marks if m in answer.message["content"] and m not in READ]:
            raise Refused(
                f"the answer holds {unread[0]}: the server does not tell what this model thinks "
                "from what it says; start it with the parser of this model's reasoning (SGLang: "
                "--reasoning-parser auto; ours: +engine.args.reasoning_parser=<name>)"
            )
        if answer.finish_reason == "length":  # which may be within a character
            whole = str(answer.message["content"]).rstrip("\N{REPLACEMENT CHARACTER}")
            answer = replace(answer, message={**answer.message, "content": whole})
        if rules.thinking != "model":
            answer = replace(answer, message=sort_thoughts(answer.message, rules.thinking))
        if answer.finish_reason == "length" and rules.truncated == "drop":
            raise Stop(f"cut at regen.max_tokens={rules.sampling.max_tokens}")
        if answer.message["content"].strip() or answer.message.get("tool_calls"):
            return answer
        if answer.finish_reason == "length":
            raise Stop(f"nothing but thoughts in regen.max_tokens={rules.sampling.max_tokens}")
    raise Failed("the answer is empty")


def check_room(record: Record, messages: list[Message], rules: Rules, before: list[Answer]) -> None:
    """Raise Stop when the conversation fills max_length already.

    No token is shorter than a byte, so most conversations need no tokenizer; how long a template
    makes tools, calls and thoughts, only it knows.
    """
    tokens = before[-1].prompt_tokens + before[-1].completion_tokens if before else 0
    size = sum(len(m["content"].encode()) + TEMPLATE_BYTES for m in messages)
    more = record.get("tools") or any(m.get("tool_calls") or reasoning_of(m) for m in messages)
    if tokens < rules.max_length and (more or size >= rules.max_length) and rules.count:
        tokens = rules.count(record, messages)
    if tokens >= rules.max_length:
        raise Stop(f"the prompt alone has {tokens} tokens, max_length={rules.max_length}")


def sort_thoughts(message: Message, thinking: str) -> Message:
    """The message without its thoughts; with them as reasoning_content when they are kept."""
    _, inline, _, answer = split_thoughts(message["content"])
    if answer.lstrip().startswith("<think>"):  # cut before they ended
        inline, answer = answer.lstrip().removeprefix("<think>"), ""
    thoughts = (message.get("reasoning_content") or inline).strip("\n")
    sorted_out = {**message, "content": answer.lstrip("\n")}
    sorted_out.pop("reasoning_content", None)
    if thinking == "kept" and thoughts.strip():
        sorted_out["reasoning_content"] = thoughts
    return sorted_out
