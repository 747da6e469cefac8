"""What preprocess says of turns that stand apart, and of what nothing can be learnt from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from specforge_exp import paths
from specforge_exp.artifacts import model_digest, sha256
from specforge_exp.config import Config
from specforge_exp.data.blocks import cut_answers
from specforge_exp.data.chat import prompt_ids
from specforge_exp.data.tokens import read_split
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.errors import InputError
from specforge_exp.records import write_record
from specforge_exp.stages.preprocess import preprocess

Record = dict[str, Any]


def say(*texts: str, name: str = "c") -> Record:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"id": name, "conversations": messages}


@pytest.fixture
def source(cfg: Config) -> Path:
    cfg.preprocess.source = "prep"
    folder = paths.prompts_dir(cfg)
    folder.mkdir(parents=True)
    put(folder, [say("Hi", "Hello there.", name=str(i)) for i in range(5)])
    return folder


def put(folder: Path, train: list[Record]) -> None:
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "eval.jsonl", [say("Hey", "Yes.", name="e")])


LATER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Thoughts of the last answer only."""


def other_template(cfg: Config, template: str) -> None:
    """The tiny target with another chat template."""
    model = Path(cfg.paths.datasets) / "model"
    shutil.copytree(cfg.model.path, model)
    (model / "chat_template.jinja").write_text(template)
    cfg.model.path = str(model)


def test_an_answer_that_is_shown_otherwise_later_is_a_sequence_of_its_own(
    cfg: Config, source: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With its thoughts, after the prompt of its time; the growth is in the account."""
    other_template(cfg, LATER)
    record = say("Hi", "One.", "Go on", "Two.", name="two")
    for message, thoughts in zip(record["conversations"][1::2], ("hm", "so"), strict=True):
        message["reasoning"] = thoughts
    put(source, [record])
    (source / "eval.jsonl").write_bytes((source / "train.jsonl").read_bytes())
    caplog.set_level("INFO")
    folder = preprocess(cfg)
    tokens = read_split(folder, "train")
    spoken = [tiny_tokenizer.decode(ids[turns > 0]) for ids, turns in tokens]
    assert spoken == ["<think>so</think>Two.<|im_end|>", "<think>hm</think>One.<|im_end|>"]
    train = json.loads((folder / "report.json").read_text())["train"]
    assert (train["read"], train["conversations"], train["sequences"]) == (1, 1, 2)
    assert train["tokens_apart"] == len(tokens[1][0])
    assert "1 read, 1 kept, 1 of them as 2 sequences (+" in caplog.text
    cfg.preprocess.changed_turns, cfg.preprocess.force = "leave_out", True
    assert len(read_split(preprocess(cfg), "train")) == 1
    assert "1 answers left out: the chat template changes it later" in caplog.text
    assert caplog.messages[-1].count("left out of") == 2


def test_thoughts_that_no_template_shows_are_warned_about(
    cfg: Config, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = say("Hi", "One.", name="two")
    record["conversations"][1]["thinking"] = "hm"
    put(source, [record])
    preprocess(cfg)
    assert "does not show the thoughts of 1 of 1 answers of train" in caplog.text


DFLASH = DFlashConfig(name="dflash", block_size=16, draft_vocab_size=512)


def test_a_split_without_anything_to_learn_is_refused(cfg: Config, source: Path) -> None:
    """DFlash leaves out conversations with fewer than two blocks of supervised tokens."""
    cfg.draft = DFLASH
    with pytest.raises(InputError, match=r"nothing to learn from its 5 .* 5 with fewer than 32"):
        preprocess(cfg)
    assert not paths.tokens_dir(cfg).exists()


def test_a_part_without_anything_to_learn_is_counted(
    cfg: Config, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(source, [say("Hi", "Yes.", name="a"), say("Hi", "word " * 40, name="b"), say("?")])
    write_jsonl(source / "eval.jsonl", [say("Hi", "word " * 40, name="e")])
    cfg.draft = DFLASH
    caplog.set_level("INFO")
    folder = preprocess(cfg)
    reasons = {"with fewer than 32 supervised tokens (draft.min_loss_tokens)": 1}
    report = json.loads((folder / "report.json").read_text())
    assert report["train"]["nothing_to_learn"] == reasons
    record = json.loads((folder / "run.json").read_text())
    assert record["left_out"]["train"]["nothing_to_learn"] == reasons
    assert "of no use (with fewer than 32" in caplog.messages[-1]
    assert "set aside (no assistant token)" in caplog.messages[-1]


def test_the_record_says_what_trains_nothing(
    cfg: Config, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """run.json, report.json and the last line, by reason: also what max_length cuts away."""
    put(
        source,
        [
            say("Hi", "Yes.", "Go on", "word " * 500, "More", "No.", "And", "No.", name="cut"),
            say("word " * 500, "Yes.", name="all cut"),
            say("?"),
            say("Hi", "Yes.", name="whole"),
        ],
    )
    caplog.set_level("INFO")
    folder = preprocess(cfg)
    left_out = json.loads((folder / "run.json").read_text())["left_out"]
    assert left_out["train"] == {
        "read": 4,
        "set_aside": {"no assistant token within max_length": 1, "no assistant token": 1},
        "truncated": 1,
        "answers_left_out": {"behind max_length": 2},
        "nothing_to_learn": {},
    }
    report = json.loads((folder / "report.json").read_text())
    for name, counts in left_out.items():
        assert counts.items() <= report[name].items()
    last = caplog.messages[-1]
    assert "1 set aside (no assistant token within max_length)" in last
    assert "1 cut at max_length, 2 answers (behind max_length)" in last


def test_answers_of_another_target_are_told_of(
    cfg: Config, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg.preprocess.source = "regen"
    for number, target in enumerate(("another", model_digest(cfg.model.path))):
        answers = paths.regen_dir(cfg)
        shutil.copytree(source, answers, dirs_exist_ok=True)
        write_record(answers / "run.json", {"inputs": {"the target": target}, "settings": {}})
        cfg.preprocess.force = True
        folder = preprocess(cfg)
        warnings = json.loads((folder / "report.json").read_text())["warnings"]
        told = [text for text in warnings if "target was another than model.path" in text]
        assert len(told) == 1 - number
        assert all(text in caplog.text for text in told)


def test_prompts_of_another_length_are_counted(
    cfg: Config, source: Path, tiny_tokenizer: Any
) -> None:
    """A server with another template, or another model, has asked something else."""
    cfg.preprocess.source, answers = "regen", paths.regen_dir(cfg)
    answers.mkdir()
    record = say("Hi", "Hello.", "And?", "Yes.")
    record["conversations"][2:2] = [CALL, DONE]
    talk, record["finish_reasons"] = record["conversations"], ["stop", "stop"]
    right = [len(prompt_ids(tiny_tokenizer, talk[:n], {})) for n in (1, 5)]
    told = ([right[0], right[1]], [right[0] + 1, right[1]], [right[0]], [0, 0])
    put(answers, [{**record, "id": str(n), "prompt_tokens": each} for n, each in enumerate(told)])
    report = json.loads((preprocess(cfg) / "report.json").read_text())
    found = report["train"]
    assert (found["prompts_checked"], found["prompts_unlike"]) == (4, 1)
    assert [text for text in report["warnings"] if "prompts of another length than here" in text]


def test_switches_that_the_template_does_not_know(cfg: Config, source: Path) -> None:
    cfg.model.chat_template_kwargs = {"message": 1, "enable_thinkin": False}
    warnings = json.loads((preprocess(cfg) / "report.json").read_text())["warnings"]
    [told] = [text for text in warnings if "the chat template does not know" in text]
    assert told.startswith("model.chat_template_kwargs.enable_thinkin changes nothing")


def test_answers_to_other_prompts_are_told_of(cfg: Config, source: Path) -> None:
    """prep was run again under the same name, regen was not."""
    cfg.preprocess.source = "regen"
    answers, file = paths.regen_dir(cfg), source / "train.jsonl"
    shutil.copytree(source, answers)
    inputs = {"the target": model_digest(cfg.model.path), "small/train.jsonl": sha256(file)}
    write_record(answers / "run.json", {"inputs": inputs, "settings": {}})
    for told in (0, 1):
        cfg.preprocess.force = True
        warnings = json.loads((preprocess(cfg) / "report.json").read_text())["warnings"]
        assert len([text for text in warnings if "train.jsonl has changed since" in text]) == told
        put(source, [say("Hi", "Hello.", name="a")])


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
DONE = {"role": "tool", "content": "4"}
FIXED = {"role": "assistant", "content": "Oh.", "weight": 0}


@pytest.mark.parametrize(
    ("between", "reasons", "cut"),
    [
        ([], ["stop", "length"], {2}),
        ([], ["length", "stop"], {1}),
        ([], ["stop", "stop"], set()),
        ([CALL, DONE], ["stop", "length"], {3}),  # the call is the data's: nobody was asked for it
        ([CALL, DONE], ["length", "stop", "tool_calls"], {1, 2, 3}),  # not told: none has an end
        ([FIXED], ["stop", "length"], {3}),
    ],
)
def test_which_answers_were_cut(
    cfg: Config, between: list[Record], reasons: list[str], cut: set[int]
) -> None:
    cfg.preprocess.source = "regen"
    first, second = say("Hi", "Hello.")["conversations"], say("More", "No.")["conversations"]
    record = {"conversations": [*first, *between, *second], "finish_reasons": reasons}
    assert cut_answers(record, cfg) == cut
    cfg.preprocess.source = "prep"
    assert cut_answers(record, cfg) == set()


def test_weights_are_counted_or_refused_by_line(cfg: Config, source: Path) -> None:
    record = say("Hi", "Hello there.", "No", "Well then.")
    record["conversations"][1]["weight"] = 0
    put(source, [record])
    report = json.loads((preprocess(cfg) / "report.json").read_text())["train"]
    assert report["answers_left_out"] == {"an answer has the weight 0": 1}
    assert report["turns"] == 1
    record["conversations"][1]["weight"] = 2
    put(source, [say("Hi", "Hello."), record])
    cfg.preprocess.force = True
    with pytest.raises(
        InputError, match=r"train\.jsonl:2: the `weight` of a message is neither 0 nor 1: 2"
    ):
        preprocess(cfg)


def test_the_end_of_a_cut_answer_is_nothing_to_learn(
    cfg: Config, source: Path, tiny_tokenizer: Any
) -> None:
    """A template ends each answer; one that stopped at regen.max_tokens was not ended by the
    target, and labels would teach that it was."""
    cfg.preprocess.source = "regen"
    record = say("Hi", "Hello there", "Go on", "Well then", name="a")
    answers = paths.regen_dir(cfg)
    answers.mkdir()
    put(answers, [{**record, "finish_reasons": ["length", "stop"]}])
    folder = preprocess(cfg)
    ((ids_T, turns_T),) = list(read_split(folder, "train"))
    said = [tiny_tokenizer.decode(ids_T[turns_T == number]) for number in (1, 2)]
    assert said == ["Hello there", "Well then<|im_end|>"]
    report = json.loads((folder / "report.json").read_text())
    assert (report["train"]["turns_cut"], report["train"]["turns_with_end"]) == (1, 1)

    put(answers, [{**record, "finish_reasons": ["length", "length"]}])
    cfg.preprocess.force = True
    warnings = json.loads((preprocess(cfg) / "report.json").read_text())["warnings"]
    assert [text for text in warnings if "all were cut at regen.max_tokens; raise it" in text]


def test_answers_to_prompts_of_another_look_are_told_of(cfg: Config, source: Path) -> None:
    """regen.thinking changes what the template shows; preprocess has the model's options."""
    silent = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    spoken = "{% if m.role == 'assistant' %}" + silent + "{% endif %}{{ m.content }}<|im_end|>\n"
    other_template(
        cfg,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + spoken + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + silent + "{% endif %}",
    )
    cfg.preprocess.source = "regen"
    answers = paths.regen_dir(cfg)
    shutil.copytree(source, answers)
    inputs = {"the target": model_digest(cfg.model.path)}
    off = {"enable_thinking": False}
    for thinking, asked, own, told in (
        ("off", {}, {}, 1), ("off", {}, off, 0), ("model", off, {}, 1), ("on", off, {}, 0),
    ):  # fmt: skip
        settings = {"regen.thinking": thinking, "model.chat_template_kwargs": asked}
        write_record(answers / "run.json", {"inputs": inputs, "settings": settings})
        cfg.preprocess.force, cfg.model.chat_template_kwargs = True, own
        warnings = json.loads((preprocess(cfg) / "report.json").read_text())["warnings"]
        assert len([text for text in warnings if "its prompts were asked with" in text]) == told
