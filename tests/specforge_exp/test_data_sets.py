"""The named data sets: each read through its own configuration, in the layout its hub page has."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import composed
from hydra.core.config_store import ConfigStore

from specforge_exp.config import Config, from_omegaconf
from specforge_exp.data.conversations import read_jsonl
from specforge_exp.stages.prep import prep

ROOT = Path(__file__).resolve().parents[2]
ConfigStore.instance().store(name="schema", node=Config)

Record = dict[str, Any]
Prepare = Callable[..., tuple[list[Record], list[Record]]]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Runs prep here with overrides; gives the training and the held-out conversations."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[list[Record], list[Record]]:
        cfg = from_omegaconf(composed(*overrides, f"paths.datasets={tmp_path}/out"))
        folder = prep(cfg)
        train, held_out = (list(read_jsonl(folder / f"{n}.jsonl")) for n in ("train", "eval"))
        return train, held_out

    return run


def table(path: str, rows: list[Record]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pytest.importorskip("datasets")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def card(folder: str, configurations: Record) -> None:
    """The part of a hub page's README that says which files are which split."""
    text = ["---", "configs:"]
    for name, splits in configurations.items():
        text += [f"- config_name: {name}", "  data_files:"]
        for split, path in splits.items():
            text += [f"  - split: {split}", f"    path: {path}"]
    Path(folder, "README.md").write_text("\n".join([*text, "---", ""]))


def pair(asks: str, answers: str = "Fine.") -> list[Record]:
    return [{"from": "human", "value": asks}, {"from": "gpt", "value": answers}]


def turns(asks: str, answers: str = "Fine.") -> list[Record]:
    return [{"role": "user", "content": asks}, {"role": "assistant", "content": answers}]


def test_ultrachat(prepare: Prepare) -> None:
    def row(asks: str) -> Record:
        return {"prompt": asks, "prompt_id": f"id of {asks}", "messages": turns(asks)}

    folder = "HuggingFaceH4/ultrachat_200k"
    splits = "train_sft test_sft train_gen test_gen".split()
    for split in splits:
        rows = [row(f"{split} {n}") for n in range(3)]
        table(f"{folder}/data/{split}-00000-of-00001-a3ecf92756993583.parquet", rows)
    card(folder, {"default": {split: f"data/{split}-*" for split in splits}})
    train, held_out = prepare("data=ultrachat")
    first = {"id": "id of train_sft 0", "conversations": turns("train_sft 0")}
    assert train[0] == first
    assert len(train) == 3
    assert [r["id"] for r in held_out] == [f"id of test_sft {n}" for n in range(3)]


def test_sharegpt(prepare: Prepare) -> None:
    folder = Path("Aeala/ShareGPT_Vicuna_unfiltered")
    folder.mkdir(parents=True)
    records = [
        {"id": "QWJhYvA_0", "conversations": pair("Summarise this.")},
        {"id": "QWJhYvA_1", "conversations": [*pair("x")[1:], *pair("And then?")]},
        {"id": "i6IyJda_0", "conversations": [{"from": "system", "value": "S"}, *pair("Hi")]},
        {"id": "empty_0", "conversations": []},
    ]
    name = "ShareGPT_V4.3_unfiltered_cleaned_split.json"
    (folder / name).write_text(json.dumps(records, indent=2))
    (folder / "ShareGPT_2023.05.04v0_Wasteland_Edition.json").write_text("[not read")
    train, held_out = prepare("data=sharegpt", "data.split_eval=0")
    assert [r["id"] for r in train] == ["QWJhYvA_0", "QWJhYvA_1", "i6IyJda_0"]
    assert train[0]["conversations"] == turns("Summarise this.")
    assert train[1]["conversations"] == turns("And then?")
    assert [m["role"] for m in train[2]["conversations"]] == ["system", "user", "assistant"]
    assert held_out == []


def test_eaglechat(prepare: Prepare) -> None:
    pytest.importorskip("datasets")
    Path("zhaode/EagleChat").mkdir(parents=True)
    lines = [{"id": str(n), "conversations": turns(f"问题 {n}", "回答")} for n in range(40)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    Path("zhaode/EagleChat/EagleChat.jsonl").write_text(text)
    train, held_out = prepare("data=eaglechat", "data.split_eval=0.2")
    assert train[0]["conversations"][0]["content"].startswith("问题")
    assert len(train) + len(held_out) == 40
    assert held_out


def test_perfectblend(prepare: Prepare) -> None:
    rows = [{"conversations": pair(f"Solve {n}."), "source": "meta-math"} for n in range(2)]
    table("mlabonne/open-perfectblend/data/train-00000-of-00006.parquet", rows)
    train, _ = prepare("data=perfectblend", "data.split_eval=0")
    assert [r["conversations"] for r in train] == [turns("Solve 0."), turns("Solve 1.")]
    assert train[0]["source"] == "meta-math"
    assert len({r["id"] for r in train}) == 2


def test_magpie(prepare: Prepare) -> None:
    rows = [
        {
            "uuid": f"u{n}",
            "model": "Qwen/Qwen2.5-72B-Instruct",
            "gen_input_configs": {"temperature": 1.0, "seed": None},
            "instruction": f"Explain {n}.",
            "response": "Fine.",
            "conversations": pair(f"Explain {n}."),
            "task_category": "Reasoning",
            "language": "EN",
        }
        for n in range(2)
    ]
    folder = "Magpie-Align/Magpie-Qwen2.5-Pro-1M-v0.1"
    table(f"{folder}/data/train-00000-of-00010.parquet", rows)
    train, _ = prepare("data=magpie-qwen2.5-pro-1m-v0.1", "data.split_eval=0")
    first = {"id": "u0", "conversations": turns("Explain 0.")}
    assert train[0] == first  # and none of the other columns
    assert len(train) == 2


def test_opc(prepare: Prepare) -> None:
    names = "filtered_infinity_instruct realuser_instruct largescale_diverse_instruct".split()
    folder = "OpenCoder-LLM/opc-sft-stage1"
    for name in names:
        row = {"instruction": f"Code of {name}", "output": "print()", "tag": "x"}
        table(f"{folder}/{name}/train-00000-of-00001.parquet", [row])
    card(folder, {name: {"train": f"{name}/train-*"} for name in names})
    train, _ = prepare("data=opc")
    assert [r["conversations"] for r in train] == [turns(f"Code of {names[2]}", "print()")]
    hub = "hub:OpenCoder-LLM/opc-sft-stage1/realuser_instruct"
    source = f"data.train=[{{path: '{hub}', format: instruction}}]"
    train, _ = prepare("data=opc", "data.name=real", source)
    assert train[0]["conversations"][0]["content"] == "Code of realuser_instruct"


PICTURES = [
    (
        "sharegpt4v",
        "Lin-Chen/ShareGPT4V/sharegpt4v_instruct_gpt4-vision_cap100k.json",
        {"id": "000000000009", "image": "coco/train2017/000000000009.jpg"},
    ),
    (
        "allava4v",
        "FreedomIntelligence/ALLaVA-4V/allava_laion/ALLaVA-Instruct-LAION-4V.json",
        {"id": "allava_laion_inst_100", "image": "allava_laion/images/100.jpeg", "url": "http://x"},
    ),
]


@pytest.mark.parametrize(("data", "file", "record"), PICTURES, ids=[name for name, *_ in PICTURES])
def test_pictures(
    prepare: Prepare, caplog: pytest.LogCaptureFixture, data: str, file: str, record: Record
) -> None:
    Path(file).parent.mkdir(parents=True)
    text = "What do you see?"
    other = {**record, "id": "b", "image": "other.jpg"}
    dialogs = [(record, f"<image>\n{text}"), (other, f"{text}\n<image>")]
    found = [r | {"conversations": pair(asks)} for r, asks in dialogs]
    Path(file).write_text(json.dumps(found))
    with caplog.at_level(logging.WARNING):
        train, held_out = prepare(f"data={data}")
    assert "train: 2 conversations are about a picture; only their text is used" in caplog.text
    assert "training on pictures is out of scope" in caplog.text
    both = {r["id"]: r for r in [*train, *held_out]}
    assert both[record["id"]] == {**record, "conversations": turns(text)}
    assert both["b"]["conversations"] == turns(text)
    assert len(train) == len(held_out) == 1


def test_synthetic(prepare: Prepare) -> None:
    train, held_out = prepare("data=synthetic")
    assert (len(train), len(held_out)) == (100, 10)


def test_any_hub_data_set(prepare: Prepare) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"{n}.", "text": "unused"} for n in range(2)]
    table("tatsu-lab/alpaca/data/train-00000-of-00001.parquet", rows)
    options = ["data=local", "data.path=hub:tatsu-lab/alpaca", "data.format=instruction"]
    train, _ = prepare(*options, "data.split_eval=0")
    assert [r["conversations"] for r in train] == [turns("Say 0.", "0."), turns("Say 1.", "1.")]
