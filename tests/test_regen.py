"""Regeneration: every turn by the target itself, in order, exactly once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_exp import paths
from specforge_exp.chat import prompt_ids
from specforge_exp.config import Config
from specforge_exp.conversations import write_jsonl
from specforge_exp.errors import InputError
from specforge_exp.generation.transformers_engine import TransformersEngine
from specforge_exp.stages import regen as stage
from specforge_exp.stages.regen import regen
from specforge_exp.target import Target

Record = dict[str, Any]


def say(*texts: str, name: str = "c", system: str | None = None) -> Record:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"id": name, "conversations": messages}


@pytest.fixture
def prompts(cfg: Config) -> list[Record]:
    """Written as prep would; cfg is set to short greedy answers."""
    cfg.regen.temperature = 0.0
    cfg.regen.max_tokens = 12
    cfg.engine.batch_size = 2
    records = [
        say("Describe a kettle.", name="one"),
        say("How can I bake bread?", "old", "And then?", "old", name="two"),
        say("Who are you?", "old answer", name="three", system="You are a helpful assistant."),
        say("Write a story about a fox named Ada.", "x", "Thanks.", name="four"),
        say("word " * 400, name="too-long"),
    ]
    folder = paths.prompts_dir(cfg)
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", records)
    write_jsonl(folder / "eval.jsonl", records[:1])
    return records


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_turn_is_the_targets_own(
    cfg: Config, prompts: list[Record], tiny_target: Target, tiny_tokenizer: Any
) -> None:
    folder = regen(cfg)
    done = read(folder / "train.jsonl")
    assert [r["id"] for r in done] == ["one", "two", "three", "four"]
    failed = read(folder / "failed.jsonl")
    assert [r["id"] for r in failed] == ["too-long"]
    assert "max_length=256" in failed[0]["error"]
    roles = [[m["role"] for m in r["conversations"]] for r in done]
    assert roles[1] == ["user", "assistant", "user", "assistant"]
    assert roles[2] == ["system", "user", "assistant"]
    assert roles[3] == ["user", "assistant", "user", "assistant"]
    for record in done:
        messages = record["conversations"]
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = torch.tensor([prompt_ids(tiny_tokenizer, messages[:index], {})])
            out = tiny_target.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
            )
            text = tiny_tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
            assert message["content"] == text
        assert all(reason in ("stop", "length") for reason in record["finish_reasons"])


def test_complete_is_reused_and_a_change_is_named(cfg: Config, prompts: list[Record]) -> None:
    folder = regen(cfg)
    stamp = (folder / "run.json").stat().st_mtime_ns
    regen(cfg)
    assert (folder / "run.json").stat().st_mtime_ns == stamp
    cfg.regen.max_tokens = 13
    with pytest.raises(InputError, match=r"regen\.max_tokens was 12, now 13"):
        regen(cfg)


def test_interrupted_continues(
    cfg: Config, prompts: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first batch, with half a line written: the rest is done, nothing twice."""
    whole = read(regen(cfg) / "train.jsonl")
    cfg.regen.force = True
    batches: list[int] = []
    answer = stage.answer

    def stop_after_one(cfg: Config, engine: TransformersEngine, batch: Any) -> Any:
        if len(batches) == 1:
            raise KeyboardInterrupt
        batches.append(len(batch))
        return answer(cfg, engine, batch)

    monkeypatch.setattr(stage, "answer", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        regen(cfg)
    journal = paths.regen_dir(cfg).with_suffix(".partial") / "train.done"
    assert len(journal.read_text().splitlines()) == 2
    with journal.open("a") as file:
        file.write('{"number": 3, "resu')
    seen: list[int] = []

    def count(cfg: Config, engine: TransformersEngine, batch: Any) -> Any:
        seen.extend(number for number, _ in batch)
        return answer(cfg, engine, batch)

    monkeypatch.setattr(stage, "answer", count)
    assert read(regen(cfg) / "train.jsonl") == whole
    assert len(seen) == 3 + 1  # the rest of train, and eval


def test_sampling_is_repeatable(cfg: Config, prompts: list[Record]) -> None:
    cfg.regen.temperature = 1.0
    first = read(regen(cfg) / "train.jsonl")
    cfg.regen.force = True
    assert read(regen(cfg) / "train.jsonl") == first


def test_missing_prompts_name_the_command(cfg: Config) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl does not exist.*python prep\.py"):
        regen(cfg)
