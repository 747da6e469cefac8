"""Tokens on disk: what is kept, what is set aside, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl

from specforge_exp import paths
from specforge_exp.artifacts import partial_of
from specforge_exp.config import Config
from specforge_exp.data import blocks
from specforge_exp.data.tokens import read_split
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.errors import InputError
from specforge_exp.stages.preprocess import doubts, preprocess

Record = dict[str, Any]


def say(*texts: str, name: str = "c") -> Record:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"id": name, "conversations": messages}


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def test_shards_hold_every_conversation(cfg: Config, source: Path, tiny_tokenizer: Any) -> None:
    cfg.preprocess.shard_tokens = 40
    folder = preprocess(cfg)
    index = json.loads((folder / "index.json").read_text())
    assert len(index["train"]) > 1
    assert sum(shard["conversations"] for shard in index["train"]) == 5
    tokens = read_split(folder, "train")
    assert len(tokens) == 5
    text = tiny_tokenizer.decode(tokens[4][0])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there.<|im_end|>\n"
    mapping = torch.load(folder / "vocab_mapping.pt", weights_only=True)
    assert set(mapping) == {"d2t", "t2d"}
    assert mapping["t2d"].sum() == 512
    ids, turns = tokens[0]
    assert mapping["t2d"][ids[turns > 0]].all()


def test_what_is_replaced_while_it_is_read_is_refused(
    cfg: Config, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record would name what was there before."""

    def replaced(path: Path) -> list[blocks.LineBlock]:
        put(source, [say("Hi", "Another answer.", name=str(i)) for i in range(5)])
        return blocks.cut(path)

    monkeypatch.setattr("specforge_exp.stages.preprocess.cut", replaced)
    with pytest.raises(InputError, match=r"train\.jsonl has changed while it was read"):
        preprocess(cfg)
    assert not paths.tokens_dir(cfg).exists()


def test_a_full_disk_is_said_of_the_vocabulary_too(
    cfg: Config, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full answers every write with the real error of a full disk."""

    def without_room(*given: Any) -> dict[str, torch.Tensor]:
        (partial_of(paths.tokens_dir(cfg)) / "vocab_mapping.pt").symlink_to("/dev/full")
        return vocabulary_mapping(*given)

    monkeypatch.setattr("specforge_exp.stages.preprocess.vocabulary_mapping", without_room)
    with pytest.raises(InputError, match="the disk is full while writing"):
        preprocess(cfg)


def test_a_vocabulary_above_the_targets_costs_no_work(cfg: Config, source: Path) -> None:
    cfg.draft = replace(cfg.draft, draft_vocab_size=5000)
    with pytest.raises(InputError, match=r"draft\.draft_vocab_size=5000 .* of 1024; draft"):
        preprocess(cfg)
    assert not list(paths.tokens_dir(cfg).parent.glob("*.tokens*"))


def test_a_draft_with_the_targets_head_has_all_of_its_tokens(
    cfg: Config, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No vocabulary covers too little, and none is too large."""
    for size in (2, 5000):
        cfg.draft = DFlashConfig(name="dflash", draft_vocab_size=size, min_loss_tokens=1)
        cfg.preprocess.force = True
        folder = preprocess(cfg)
        assert json.loads((folder / "report.json").read_text())["train"]["coverage"] == 1.0
    assert "vocabulary" not in caplog.text and "cover" not in caplog.text


def test_the_whole_vocabulary(cfg: Config, source: Path) -> None:
    cfg.draft.draft_vocab_size = None
    mapping = torch.load(preprocess(cfg) / "vocab_mapping.pt", weights_only=True)
    assert mapping["t2d"].all()
    assert not mapping["d2t"].any()


def test_what_cannot_be_trained_on_is_set_aside(cfg: Config, source: Path) -> None:
    put(source, [say("Hi", "Yes.", name="good"), say("only a question", name="bad")])
    folder = preprocess(cfg)
    rejected = read(folder / "train.rejected.jsonl")
    assert [(r["id"], r["reason"]) for r in rejected] == [("bad", "no assistant token")]
    assert len(read_split(folder, "train")) == 1


def test_a_reason_of_the_datas_own(cfg: Config, source: Path) -> None:
    put(source, [say("Hi", "Hello.", name="a"), {**say("?", name="b"), "reason": "mine"}])
    [line] = (preprocess(cfg) / "train.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "no assistant token"


@pytest.mark.parametrize("overlong", ["truncate", "drop", "error"])
def test_overlong(
    cfg: Config, source: Path, overlong: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(source, [say("Hi", "word " * 500, name="long"), say("Hi", "Yes.", name="short")])
    cfg.preprocess.overlong = overlong
    caplog.set_level("INFO")
    if overlong == "error":
        with pytest.raises(InputError, match=r"conversation long has .* max_length=256"):
            preprocess(cfg)
        assert not paths.tokens_dir(cfg).exists()
        return
    tokens = read_split(preprocess(cfg), "train")
    sizes = tokens.lengths.tolist()
    assert max(sizes) == 256 if overlong == "truncate" else len(sizes) == 1
    expected = "1 truncated" if overlong == "truncate" else "1 set aside: longer than max_length"
    assert expected in caplog.text


def test_nothing_left_is_an_error(cfg: Config, source: Path) -> None:
    put(source, [say("only a question")])
    with pytest.raises(InputError, match="no conversation is left to train on"):
        preprocess(cfg)
    put(source, [])
    with pytest.raises(InputError, match=r"train\.jsonl has changed.*preprocess\.force=true"):
        preprocess(cfg)
    cfg.preprocess.force = True
    with pytest.raises(InputError, match="it is empty"):
        preprocess(cfg)


def test_malformed_line_of_a_stage_file_is_named(cfg: Config, source: Path) -> None:
    with (source / "train.jsonl").open("a") as file:
        file.write('{"id": 1, "conversations": [{"role": "user"\n')
    with pytest.raises(InputError, match=r"train\.jsonl:6: "):
        preprocess(cfg)


def test_reused_and_changed(cfg: Config, source: Path) -> None:
    folder = preprocess(cfg)
    stamp = (folder / "run.json").stat().st_mtime_ns
    preprocess(cfg)
    assert (folder / "run.json").stat().st_mtime_ns == stamp
    put(source, [say("Hi", "Other.", name="x")])
    with pytest.raises(InputError, match=r"train\.jsonl has changed"):
        preprocess(cfg)
    cfg.preprocess.force = True
    assert len(read_split(preprocess(cfg), "train")) == 1


def test_missing_regen_names_both_ways(cfg: Config) -> None:
    with pytest.raises(InputError, match=r"python regen\.py.*preprocess\.source=prep"):
        preprocess(cfg)


def test_truncated_shard_is_named(cfg: Config, source: Path) -> None:
    folder = preprocess(cfg)
    shard = folder / "train-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"train-00000\.safetensors.*preprocess\.force=true"):
        read_split(folder, "train")


def test_target_without_chat_template(cfg: Config, source: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(cfg.model.path).glob("*"):
        if file.is_file() and "template" not in file.name:
            (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    cfg.model.path = str(model)
    with pytest.raises(InputError, match="no chat template"):
        preprocess(cfg)


def test_a_target_too_shallow_for_the_draft(
    cfg: Config, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A word, not the end: a model without a draft is taught by the same tokens."""
    cfg.model.path = shutil.copytree(cfg.model.path, tmp_path / "m").as_posix()
    file = tmp_path / "m" / "config.json"
    shallow = {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}
    file.write_text(json.dumps(json.loads(file.read_text()) | shallow))
    assert preprocess(cfg) and "train no draft, only models: the target has 6" in caplog.text


def chats(count: int) -> list[Record]:
    """Conversations of different lengths; every fifth has no answer."""
    texts = (
        ("Hi " * (i % 7 + 1), f"Number {i}. " * (i % 5 + 1))[: 2 - (i % 5 == 4)]
        for i in range(count)
    )
    return [say(*text, name=str(number)) for number, text in enumerate(texts)]


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the record of the run."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.json"}


def test_any_number_of_processes_writes_the_same(
    cfg: Config, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "LINES", 16)
    put(source, chats(150))
    cfg.preprocess.shard_tokens = 300
    cfg.preprocess.force = True
    cfg.preprocess.processes = 1
    alone = content(preprocess(cfg))
    assert len([name for name in alone if name.startswith("train-")]) > 2
    assert [r["id"] for r in read(paths.tokens_dir(cfg) / "train.rejected.jsonl")] == [
        str(i) for i in range(4, 150, 5)
    ]
    cfg.preprocess.processes = 3
    assert content(preprocess(cfg)) == alone
    monkeypatch.setattr(blocks, "LINES", 512)
    cfg.preprocess.processes = None
    assert content(preprocess(cfg)) == alone


@pytest.mark.slow
def test_an_error_in_a_process_is_the_users_to_mend(
    cfg: Config, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "LINES", 2)
    cfg.preprocess.processes = 2
    with (source / "train.jsonl").open("ab") as file:
        file.write(b'{"id": 1, "conversations": "\xff"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl:6: .*utf-8"):
        preprocess(cfg)


def test_report(cfg: Config, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    put(source, [*(say("Hi", "Hello there.", name=str(i)) for i in range(9)), say("?", name="x")])
    folder = preprocess(cfg)
    report = json.loads((folder / "report.json").read_text())
    train = report["train"]
    tokens = read_split(folder, "train")
    supervised = sum(int((turns > 0).sum()) for _, turns in tokens)
    assert (train["read"], train["conversations"], train["truncated"]) == (10, 9, 0)
    assert train["set_aside"] == {"no assistant token": 1}
    assert train["tokens"] == sum(len(ids) for ids, _ in tokens)
    assert train["supervised_tokens"] == supervised
    assert train["turns"] == train["turns_with_end"] == 9
    assert (train["answers_checked"], train["answers_misread"]) == (1, 0)
    assert train["coverage"] == 1.0
    assert train["lengths"]["max"] == len(tokens[0][0])
    assert train["packing"]["rows"] == 1
    assert report["eval"]["coverage"] > 0
    assert "cover 100.00 % of the answers" in caplog.text
    assert report["warnings"] == []


def test_doubtful_masks_are_warned_about(
    cfg: Config, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A small vocabulary, and a template after whose answers nothing ends the turn."""
    model = Path(cfg.paths.datasets) / "model"
    shutil.copytree(cfg.model.path, model)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", ""))
    cfg.model.path = str(model)
    cfg.draft.draft_vocab_size = 3
    report = json.loads((preprocess(cfg) / "report.json").read_text())
    assert report["train"]["coverage"] < 0.95
    assert "raise draft.draft_vocab_size" in caplog.text
    assert [text for text in report["warnings"] if "the draft never learns to stop" in text]


def test_an_end_at_which_nobody_stops_is_named(cfg: Config, source: Path) -> None:
    """The chat template of a base model."""
    model = shutil.copytree(cfg.model.path, Path(cfg.paths.datasets) / "model")
    for name, key, end in (
        ("generation", "eos_token_id", 0),
        ("tokenizer", "eos_token", "<|endoftext|>"),
    ):
        file = model / f"{name}_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: end}))
    cfg.model.path = str(model)
    report = json.loads((preprocess(cfg) / "report.json").read_text())
    assert "ends the answers of train with <|im_end|>, at which" in report["warnings"][0]


def test_a_tokenizer_of_another_model(cfg: Config, source: Path) -> None:
    model = Path(cfg.paths.datasets) / "model"
    shutil.copytree(cfg.model.path, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "vocab_size": 100}))
    cfg.model.path, cfg.draft.draft_vocab_size = str(model), None
    with pytest.raises(InputError, match=r"token \d+ \('.+'\) is none of the target's 100"):
        preprocess(cfg)


def test_doubts() -> None:
    entry = {
        "conversations": 9, "coverage": 0.99, "turns_with_end": 9, "supervised_share": 0.5,
        "answers_checked": 50, "answers_misread": 1, "thoughts_not_shown": 1,
        "prompts_checked": 50, "prompts_unlike": 1,
    }  # fmt: skip
    assert doubts("train", entry) == []
    assert "0.5% of the tokens" in doubts("train", {**entry, "supervised_share": 0.005})[0]
    assert "100.0% of the tokens" in doubts("train", {**entry, "supervised_share": 1.0})[0]
    assert "2 of 50 answers" in doubts("train", {**entry, "answers_misread": 2})[0]
    assert (
        "2 of 50 answers of train were given to prompts of another length"
        in (doubts("train", {**entry, "prompts_unlike": 2})[0])
    )
    assert "thoughts of 2 of 50" in doubts("train", {**entry, "thoughts_not_shown": 2})[0]
    assert doubts("eval", {**entry, "conversations": 0, "coverage": 0.0}) == []
