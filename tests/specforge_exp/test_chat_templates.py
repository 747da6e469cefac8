"""What the model writes is what is supervised, in every template that people serve."""

from dataclasses import replace
from typing import Any

import pytest
from chat_oracle import Oracle, check, opens
from chat_shapes import SHAPES, Shape
from chat_templates import CALL, TALKS, chat_of, table, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_exp.data.chat import Chat, Encoded, Message, Unrenderable, encode_many, prompt_ids
from specforge_exp.data.turns import end_of_answers


def test_a_prompt_begins_once() -> None:
    """Templates write the first token, which tokenizers put before every other text."""
    for shape in SHAPES:
        tokenizer, expected = tokenizer_of(shape), Oracle(shape, TALKS["masks"]).prompt(1)
        assert prompt_ids(tokenizer, TALKS["masks"][:1], shape.kwargs) == expected
        if shape.bos:
            assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
            assert expected.count(tokenizer.bos_token_id) == 1


KEYS = ("reasoning_content", "reasoning", "thinking", "tags", None)
SPACE = st.sampled_from(["", "", "", " ", "\n", "\n\n", "  "])
PLAIN = st.sampled_from(
    ["Yes.", "Hello you.", "Ünïcödé 😀 日本", "a", "1 + 1 = 2", "{}\n\n- x", "No</b>"]
)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Words, now and then between blanks."""
    return draw(SPACE) + draw(PLAIN) + draw(SPACE)


@st.composite
def answers(draw: st.DrawFn, tools: bool) -> list[Message]:
    """An answer, maybe with thoughts, or calls with their results and an answer."""
    message: Message = {"role": "assistant", "content": draw(texts())}
    key = draw(st.sampled_from(KEYS))
    if key == "tags":
        message["content"] = "<think>\n" + draw(PLAIN) + "\n</think>\n\n" + message["content"]
    elif key is not None:
        message[key] = draw(PLAIN)
    if not tools or draw(st.booleans()):
        return [message] if not draw(st.booleans()) else [{**message, "tool_calls": []}]
    words = draw(st.sampled_from(["", "Let me see."]))
    result = {"role": "tool", "content": "sunny"}
    return [{"role": "assistant", "content": words, "tool_calls": [CALL]}, result, message]


@st.composite
def conversations(draw: st.DrawFn, tools: bool) -> list[Message]:
    """Up to three questions; the last may be open."""
    messages: list[Message] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": "Be kind."})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts())})
        messages += draw(answers(tools))
    return messages + ([{"role": "user", "content": "And?"}] if draw(st.booleans()) else [])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_the_model_writes_is_supervised(shape: Shape, data: st.DataObject) -> None:
    messages = data.draw(conversations(shape.tools))
    (result,) = encode_many(chat_of(shape), [{"conversations": messages}])
    clean = [{k: v for k, v in m.items() if k != "tool_calls" or v} for m in messages]
    check(Oracle(shape, clean), result)


def spoken(name: str, messages: list[Message], **options: Any) -> list[str]:
    """What is supervised of a conversation in a template, turn by turn."""
    (shape,) = [shape for shape in SHAPES if shape.name == name]
    (result,) = encode_many(chat_of(shape, **options), [{"conversations": messages}])
    if isinstance(result, Unrenderable):
        return [str(result)]
    decode = tokenizer_of(shape).decode
    said = {
        number: decode(sequence.ids[first:last])
        for sequence in (result, *result.apart)
        for number, (first, last) in zip(sequence.numbers, sequence.spans, strict=True)
    }
    return [said[number] for number in sorted(said)] + list(result.left_out)


def user(words: str) -> Message:
    return {"role": "user", "content": words}


def assistant(words: str, **more: Any) -> Message:
    return {"role": "assistant", "content": words, **more}


TWICE = [user("Hi"), assistant("One."), user("Go on"), assistant("Two.")]
THOUGHT = [
    user("Hi"),
    assistant("One.", reasoning="a"),
    user("Go"),
    assistant("Two.", thinking="b"),
]
TAGGED = [user("Hi"), assistant("<think>\na\n</think>\n\nOne.")]
CALLED = [user("Rain?"), assistant("Wait.", tool_calls=[CALL]), {"role": "tool", "content": "sun"}]
CALLED += [assistant("No.", tool_calls=[])]
THOUGHT_CALLED = [
    user("Rain?"), assistant("", thinking="a", tool_calls=[CALL]),
    {"role": "tool", "content": "sun"}, assistant("No.", thinking="b"),
]  # fmt: skip
RETURN, EOS = "<|return|>", "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("Llama 2", TWICE, [" One. </s>", " Two. </s>"]),
        ("Mistral v0.3", TWICE, [" One.</s>", " Two.</s>"]),
        ("Llama 3.1", CALLED, [
            '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "No.<|eot_id|>"]),
        ("Mistral Nemo", CALLED, [
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]</s>', "No.</s>"]),
        ("gpt-oss", TWICE, [
            "<|channel|>final<|message|>One.<|end|>",
            f"<|channel|>final<|message|>Two.{RETURN}"]),
        ("gpt-oss", THOUGHT, [
            "<|channel|>analysis<|message|>a<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>One.{RETURN}",
            "<|channel|>analysis<|message|>b<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>Two.{RETURN}"]),
        ("Qwen3, thinking", THOUGHT, [
            "<think>\na\n</think>\n\nOne.<|im_end|>", "<think>\nb\n</think>\n\nTwo.<|im_end|>"]),
        ("Qwen3, not thinking", TWICE, ["One.<|im_end|>", "Two.<|im_end|>"]),
        ("Qwen3, not thinking", TAGGED, [
            "its prompt closes the thoughts that an answer has (preprocess.thinking=out takes them "
            "out)"]),
        ("DeepSeek-R1-Distill", TAGGED, [f"a\n</think>\n\nOne.{EOS}"]),
        ("DeepSeek-R1-Distill", THOUGHT, [
            f"a\n</think>\n\nOne.{EOS}", f"b\n</think>\n\nTwo.{EOS}"]),
        ("DeepSeek-R1-Distill", [user("Hi"), assistant("<think>a</think>One.")], [
            f"a</think>One.{EOS}"]),
        ("DeepSeek-R1-Distill", [user("Hi"), assistant("\n\nOne.  ", reasoning="a")], [
            f"a\n</think>\n\nOne.  {EOS}"]),
        ("DeepSeek-V3.1, thinking", TAGGED, [f"\na\n</think>\n\nOne.{EOS}"]),
        ("Nemotron", TWICE, ["One.\n<extra_id_1>", "Two.\n<extra_id_1>"]),
        ("DeepSeek-R1-Distill", [*TAGGED, *TWICE[:2]], [
            f"a\n</think>\n\nOne.{EOS}",
            "its prompt opens thoughts, and an answer has none (regen.thinking=kept records them, "
            "model.chat_template_kwargs may switch them off)"]),
        ("GLM-4.5", TWICE, [
            "\n<think></think>\nOne.<|user|>", "\n<think></think>\nTwo.<|user|>"]),
        ("GLM-4.5, not thinking", CALLED, [
            '\nWait.\n<tool_call>weather\n{"city": "Rome"}\n</tool_call><|observation|>',
            "\nNo.<|user|>"]),
        ("GLM-4.5, not thinking", CALLED[:2], [
            '\nWait.\n<tool_call>weather\n{"city": "Rome"}\n</tool_call><|observation|>']),
        ("Vicuna", TWICE, ["One.</s>", "Two.</s>"]),
        ("Mistral v0.3", [{"role": "system", "content": "Be kind."}, *TWICE], [
            " One.</s>", " Two.</s>"]),
        ("gpt-oss", THOUGHT_CALLED, [
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary"
            ' to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
            "<|channel|>analysis<|message|>b<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>No.{RETURN}"]),
        ("GLM-4.5", THOUGHT_CALLED, [
            '\n<think>a</think>\n<tool_call>weather\n{"city": "Rome"}\n</tool_call>'
            "<|observation|>", "\n<think>b</think>\nNo.<|user|>"]),
        ("Gemma 4", TWICE, ["One.<turn|>", "Two.<turn|>"]),
        ("Gemma 4", CALLED, [
            '<|tool_call>call:weather{"city": "Rome"}<tool_call|><|tool_response>', "No.<turn|>"]),
        ("Gemma 4", TAGGED, [
            "its prompt closes the thoughts that an answer has (preprocess.thinking=out takes them "
            "out)"]),
        ("Gemma 4, thinking", THOUGHT_CALLED, [
            '<|channel>thought\na\n<channel|><|tool_call>call:weather{"city": "Rome"}<tool_call|>'
            "<|tool_response>", "<|channel>thought\nb\n<channel|>No.<turn|>"]),
        ("Gemma 4, thinking", TAGGED, ["<|channel>thought\na\n<channel|>One.<turn|>"]),
        ("Gemma 4, thinking", [user("Hi"), assistant("One.", reasoning="One")], [
            "<|channel>thought\nOne\n<channel|>One.<turn|>"]),
        ("Seed-OSS", THOUGHT, [
            "<seed:think>a</seed:think>\nOne.<seed:eos>",
            "<seed:think>b</seed:think>\nTwo.<seed:eos>"]),
        ("Seed-OSS at 0", TWICE, ["One.<seed:eos>", "Two.<seed:eos>"]),
        ("Seed-OSS at 0", TAGGED, [
            "its prompt closes the thoughts that an answer has (preprocess.thinking=out takes them "
            "out)"]),
        ("Solar Open", THOUGHT, [
            "<|think|>a<|end|><|begin|>assistant<|content|>One.<|stop|>",
            "<|think|>b<|end|><|begin|>assistant<|content|>Two.<|stop|>"]),
        ("Gemma", [{"role": "system", "content": "Be kind."}, *TWICE], [
            "the chat template refuses it: System role not supported; prep with data.system=join "
            "puts the system message in front of the first user turn"]),
    ],
)  # fmt: skip
def test_turns_by_template(name: str, messages: list[Message], expected: list[str]) -> None:
    assert spoken(name, messages) == expected


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_what_stands_before_a_conversation_changes_no_turn(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt is the beginning of what the template shows later, and turns are as they were."""
    talks = (THOUGHT, {}), (TWICE, {"last_turn_only": True})
    plain = [spoken(shape.name, talk, **options) for talk, options in talks]
    changing = "{{ messages | length }}" + shape.template
    monkeypatch.setattr(tokenizer_of(shape), "chat_template", changing)
    assert [spoken(shape.name, talk, **options) for talk, options in talks] == plain
    (result,) = encode_many(chat_of(shape), [{"conversations": TWICE}])
    for sequence in (result, *result.apart) if isinstance(result, Encoded) else ():
        [(number, (first, _))] = zip(sequence.numbers, sequence.spans, strict=True)
        assert sequence.ids[:first] == Oracle(shape, TWICE).prompt(number)


@pytest.mark.parametrize("message", [TAGGED[1], THOUGHT[1]], ids=["within", "beside"])
def test_marks_that_are_not_known_are_not_made_up(message: Message) -> None:
    """A template that shows thoughts behind another prompt than the one that it makes."""
    (seed,) = [shape for shape in SHAPES if shape.name == "Seed-OSS at 0"]
    shape = replace(seed, name="odd", template=seed.template.replace("seed:think", "mull"))
    (result,) = encode_many(chat_of(shape), [{"conversations": [user("Hi"), message]}])
    assert isinstance(result, Unrenderable) and "writes thoughts is not known" in str(result)


def test_a_sequence_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations whose turns all become sequences of their own: no pair of them once more."""
    (shape,) = [shape for shape in SHAPES if shape.name == "Qwen3, thinking"]
    texts: list[str] = []
    rows_of = Chat.rows_of
    monkeypatch.setattr(Chat, "rows_of", lambda chat, new: texts.extend(new) or rows_of(chat, new))
    (result,) = encode_many(chat_of(shape), [{"conversations": THOUGHT * 4}])
    assert isinstance(result, Encoded) and len(result.apart) == 7 and len(texts) == 8


def test_the_last_turn_only() -> None:
    assert spoken("gpt-oss", TWICE, last_turn_only=True) == [
        f"<|channel|>final<|message|>Two.{RETURN}"
    ]


def test_thoughts_out_under_every_key() -> None:
    for key in KEYS[:3]:
        messages = [user("Hi"), assistant("One.", **{key: "hm"})]
        assert spoken("SmolLM2", messages, thinking="out") == ["One.<|im_end|>"]
        (said,) = spoken("GLM-4.5", messages, thinking="out")
        assert said == "\n<think></think>\nOne.<|user|>"


def test_named_templates() -> None:
    """A record with tools is rendered with the template for tools, its prompts too, also where it
    is told the day."""
    day = "{{ strftime_now('%Y') }}"
    plain, tools = "{{ bos_token }}" + SHAPES[3].template, day + SHAPES[3].template
    tokenizer = tokenizer_of(SHAPES[3])
    chat = chat_of(SHAPES[3])
    before, tokenizer.chat_template = tokenizer.chat_template, {"default": plain, "tool_use": tools}
    try:
        with_tools = {"conversations": CALLED, "tools": [{"name": "weather"}]}
        both = encode_many(chat, [with_tools, {"conversations": TWICE}])
        assert [len(r.spans) for r in both if isinstance(r, Encoded)] == [2, 2]
        years = [tokenizer.decode(r.ids).count("2025") for r in both if isinstance(r, Encoded)]
        assert years == [1, 0]
    finally:
        tokenizer.chat_template = before


def test_an_answer_that_nobody_asked_for_is_not_supervised() -> None:
    messages = [assistant("Welcome."), *TWICE[:2]]
    assert spoken("SmolLM2", messages) == [
        "One.<|im_end|>", "no prompt can be made of what stands before an answer",
    ]  # fmt: skip


def test_a_line_break_that_would_join_the_prompts() -> None:
    """The tokens of the prompt stay as a server has them, whatever the answer begins with."""
    (shape,) = [shape for shape in SHAPES if shape.name == "SmolLM2"]
    messages = [user("Hi"), assistant("\nOne."), user("Go"), assistant("Two.")]
    (result,) = encode_many(chat_of(shape), [{"conversations": messages}])
    assert isinstance(result, Encoded)
    assert [sequence.numbers for sequence in (result, *result.apart)] == [(2,), (1,)]
    check(Oracle(shape, messages), result)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_tokens_that_people_type(shape: Shape) -> None:
    """Special tokens in what is asked are tokens of the prompt, as a server makes it, and end no
    answer."""
    typed = " ".join(("What is", *shape.special, *shape.eos, "<image>", "?"))
    messages = [
        user(typed), assistant("<think>a</think>One." if opens(shape) else "One."),
        user(shape.eos[0]), assistant("<think>b</think>Two." if opens(shape) else "Two."),
    ]  # fmt: skip
    (result,) = encode_many(chat_of(shape), [{"conversations": messages}])
    check(Oracle(shape, messages), result)
    assert isinstance(result, Encoded) and not result.left_out


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_an_answer_that_spells_its_end(shape: Shape) -> None:
    """Within an answer it would teach to stop there; the answers around it are taught."""
    words = f"Write {shape.eos[0]} behind it."
    dirty, clean = ("<think>a</think>" * opens(shape) + text for text in (words, "Yes."))
    messages = [user("Hi"), assistant(clean), user("How?"), assistant(dirty), *TWICE[:1]]
    (result,) = encode_many(chat_of(shape), [{"conversations": [*messages, assistant(clean)]}])
    assert isinstance(result, Encoded)
    assert sorted(n for each in (result, *result.apart) for n in each.numbers) == [1, 3]
    assert result.left_out == ("an answer spells a token that ends answers before its end",)


def test_an_end_within_thoughts_or_a_call_and_one_at_the_end() -> None:
    end, left_out = "<|im_end|>", ["an answer spells a token that ends answers before its end"]
    answers = [("Qwen3, thinking", assistant("One.", thinking=f"a {end} b"))]
    for name, stop in (("Qwen3, thinking", end), ("DeepSeek-V3", EOS)):
        function = {"name": "say", "arguments": {"text": f"a{stop}"}}
        call = {"type": "function", "function": function}
        answers.append((name, assistant("", tool_calls=[call])))
    for name, answer in answers:
        assert spoken(name, [user("Hi"), answer]) == left_out
    assert spoken("SmolLM2", [user("Hi"), assistant(f"One.{end}\n")]) == [f"One.{end}"]


def test_the_table_has_a_row_of_each_shape() -> None:
    rows = table().splitlines()
    assert len(rows) == len(SHAPES) + 2
    assert "| gpt-oss | together | turn by turn | together |" in rows


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_end_of_an_answer_is_where_its_server_stops(shape: Shape) -> None:
    """So that nobody is warned, and sft's export gets no further stop, where the model is no base
    model; where it stops elsewhere, there is an end to be named."""
    chat = chat_of(shape)
    end = end_of_answers(chat)
    assert end in (None, *shape.eos)
    if end is not None:
        assert end_of_answers(replace(chat, eos=set())) is not None
