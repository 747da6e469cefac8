"""Which tokens of a conversation are to be supervised, by brute force: the template's own
renderings of the messages, tokenised whole."""

from dataclasses import dataclass

from chat_shapes import Shape
from chat_templates import CALL, tokenizer_of

from specforge_exp.data.chat import Encoded, Message, Unrenderable

KEYS = ("reasoning_content", "reasoning", "thinking")
SEED_CLOSED = "<seed:think>\nNone are left.\n</seed:think>"
Ids = list[int]


@dataclass(frozen=True)
class Oracle:
    """A conversation, rendered and tokenised plainly."""

    shape: Shape
    messages: list[Message]

    def text(self, count: int, prompt: bool) -> str:
        """The first messages."""
        text: str = tokenizer_of(self.shape).apply_chat_template(
            self.messages[:count], tokenize=False, add_generation_prompt=prompt, **self.shape.kwargs
        )
        return text

    def ids(self, text: str) -> Ids:
        ids: Ids = tokenizer_of(self.shape)(text, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def answers(self) -> list[int]:
        """Where the answers are."""
        return [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]

    def prompt(self, number: int) -> Ids:
        """What a server asks before an answer, counted from 1."""
        return self.ids(self.text(self.answers[number - 1], prompt=True))

    def follows(self, number: int, until: int) -> str | None:
        """What stands behind the prompt of an answer in the first messages, up to the first stop;
        None where the prompt is not how they begin."""
        return self.after(self.text(self.answers[number - 1], True), self.text(until, False))

    def after(self, prompt: str, text: str) -> str | None:
        if not text.startswith(prompt):
            return None
        said = text[len(prompt) :]
        ends = [at + len(stop) for stop in self.shape.eos if (at := said.find(stop)) >= 0]
        return said[: min(ends, default=len(said))]

    def alone(self, number: int) -> str | None:
        """What stands behind the prompt of an answer that is all there is besides its question, or
        behind empty thoughts that the prompt has closed; None where the template shows neither."""
        at = self.answers[number - 1]
        before = [self.messages[at - 1]]
        if before[0]["role"] == "tool":
            before = [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                *before,
            ]
        single = Oracle(self.shape, [*before, self.messages[at]])
        prompt, text = single.text(len(before), True), single.text(len(before) + 1, False)
        for closed in (f"{self.shape.thinks}\n<channel|>", SEED_CLOSED):
            prompt = prompt.removesuffix(closed)
        return self.after(prompt, text)


def thoughts_of(message: Message) -> str:
    """What an assistant thinks, under any key or in its words."""
    beside = next((message[key] for key in KEYS if message.get(key)), "")
    inline, closing, _ = message["content"].partition("</think>")
    return (beside or (inline.removeprefix("<think>") if closing else "")).strip()


def check(oracle: Oracle, result: Encoded | Unrenderable) -> None:
    """The law."""
    if isinstance(result, Unrenderable):
        assert not refusal_is_wrong(oracle, str(result)), result
        return
    shape, tokenizer = oracle.shape, tokenizer_of(oracle.shape)
    stops = set(tokenizer.convert_tokens_to_ids(list(shape.eos)))
    numbers = [n for sequence in (result, *result.apart) for n in sequence.numbers]
    assert len(numbers) + len(result.left_out) == len(oracle.answers)
    assert len(set(numbers)) == len(numbers)
    assert not any(refusal_is_wrong(oracle, reason) for reason in result.left_out)
    for sequence in (result, *result.apart):
        assert len(sequence.numbers) == len(sequence.spans)
        assert sequence.spans == sorted(sequence.spans)
        for number, (first, last) in zip(sequence.numbers, sequence.spans, strict=True):
            assert sequence.ids[:first] == oracle.prompt(number)
            span, message = sequence.ids[first:last], oracle.messages[oracle.answers[number - 1]]
            assert not stops & set(span[:-1])
            said = tokenizer.decode(span)
            if span[-1] not in stops:  # Harmony: earlier answers end with <|end|>
                assert shape.name == "gpt-oss"
                assert said.endswith("<|end|>")
            if not message.get("tool_calls"):
                assert message["content"].split("</think>")[-1].strip() in said
            if not (message.get("tool_calls") and thoughts_of(message)):
                shown = [
                    oracle.follows(number, until)
                    for until in (oracle.answers[number - 1] + 1, oracle.answers[number - 1] + 2)
                ]
                if shown == [None, None]:
                    shown = [oracle.alone(number)]
                assert_as_shown(said, shown, thoughts_of(message), shape)


def assert_as_shown(said: str, shown: list[str | None], thoughts: str, shape: Shape) -> None:
    """A turn's text is what the template shows; or, where it hides thoughts, what stands there."""
    ends = (*shape.eos, "<|end|>")
    if without(said, ends) not in [without(text, ends) for text in shown if text is not None]:
        assert thoughts
        assert said.lstrip().removeprefix(shape.thinks).lstrip().startswith(thoughts)
    elif thoughts and opens(shape):
        assert thoughts in said


def without(text: str, ends: tuple[str, ...]) -> str:
    """A text without the first of these ends that it has."""
    text = text.rstrip()
    return next((text.removesuffix(end) for end in ends if text.endswith(end)), text).rstrip()


def opens(shape: Shape) -> bool:
    """Whether its prompt opens thoughts."""
    probe = [{"role": "user", "content": "x"}]
    prompt = tokenizer_of(shape).apply_chat_template(
        probe, tokenize=False, add_generation_prompt=True, **shape.kwargs
    )
    return str(prompt).rstrip().endswith("<think>")


def refusal_is_wrong(oracle: Oracle, reason: str) -> bool:
    """Whether a conversation that is set aside could have been served."""
    try:
        oracle.text(len(oracle.messages), False)
    except Exception:  # templates raise whatever their author chose
        return "refuses it" not in reason
    thoughtful = [bool(thoughts_of(oracle.messages[at])) for at in oracle.answers]
    if "opens thoughts" in reason:
        return not opens(oracle.shape) or all(thoughtful)
    if "closes the thoughts" in reason or "writes thoughts is not known" in reason:
        return not any(thoughtful)
    return "tokenizer joins" not in reason
