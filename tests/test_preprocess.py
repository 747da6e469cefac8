"""Tokens on disk: what is kept, what is set aside, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_exp import paths
from specforge_exp.config import Config
from specforge_exp.conversations import write_jsonl
from specforge_exp.errors import InputError
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.tokens import read_split

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
    text = tiny_tokenizer.decode(tokens.ids[4])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there.<|im_end|>\n"
    mapping = torch.load(folder / "vocab_mapping.pt", weights_only=True)
    assert set(mapping) == {"d2t", "t2d"}
    assert mapping["t2d"].sum() == 512
    assert mapping["t2d"][tokens.ids[0][tokens.turns[0] > 0]].all()


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
    sizes = [len(ids) for ids in tokens.ids]
    assert max(sizes) == 256 if overlong == "truncate" else len(sizes) == 1
    expected = "1 truncated" if overlong == "truncate" else "1 set aside: longer than max_length"
    assert expected in caplog.text


def test_nothing_left_is_an_error(cfg: Config, source: Path) -> None:
    put(source, [say("only a question")])
    with pytest.raises(InputError, match="no conversation is left to train on"):
        preprocess(cfg)
    put(source, [])
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
