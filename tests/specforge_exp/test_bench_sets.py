"""The suite of bench: how each data set words its prompts, where they come from, how they count."""

import asyncio
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from test_conf import composed

from specforge_exp import paths
from specforge_exp.bench.acceptance import PairedAnswer, summarise
from specforge_exp.bench.asking import Asking, Talk, asking_of
from specforge_exp.bench.clients import ServedAnswer
from specforge_exp.bench.in_process import converse, load_pair
from specforge_exp.bench.served import converse as ask_server
from specforge_exp.bench.sets import SHIPPED, BenchSets, bench_sets
from specforge_exp.bench.speculative import Generation
from specforge_exp.config import Config, Source
from specforge_exp.data.conversations import asks_of
from specforge_exp.data.sources import load, spelt_out
from specforge_exp.errors import InputError
from specforge_exp.stages.bench import bench, fitting
from specforge_exp.stages.export import export
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.train import train
from specforge_exp.target import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEN = "gsm8k math500 aime24 aime25 humaneval mbpp livecodebench swe-bench mt-bench alpaca".split()
STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
CODER = (
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests. "
    "You will NOT return anything except for the program\n\n### Question:\nAdd.\n\n"
)
END = "\n\n### Answer: (use the provided format with backticks)"


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("name", "record", "asked"),
    [
        ("gsm8k", {"question": "1 + 1?", "answer": "#### 2"}, ["1 + 1?" + STEPS]),
        ("math500", {"problem": "$x$?", "answer": "2", "level": 1}, ["$x$?" + STEPS]),
        ("aime24", {"id": 60, "problem": "$x$?", "answer": "025"}, ["$x$?" + STEPS]),
        ("aime25", {"problem_idx": 1, "problem": "$x$?", "answer": 25}, ["$x$?" + STEPS]),
        (
            "humaneval",
            {"task_id": "HumanEval/0", "prompt": "def f():\n    '''Go.'''\n"},
            [
                "Write a solution to the following problem and make sure that it passes the tests:"
                "\n```python\ndef f():\n    '''Go.'''\n\n```"
            ],
        ),
        ("mbpp", {"task_id": 2, "prompt": "Write f.", "code": "def f()"}, ["Write f."]),
        (
            "livecodebench",
            {"question_content": "Add.", "starter_code": "class S:", "platform": "x"},
            [
                CODER + "### Format: Use the following code structure:\n```python\nclass S:\n```"
                + END
            ],
        ),
        (
            "livecodebench",
            {"question_content": "Add.", "starter_code": ""},
            [
                CODER + "### Format: Write your code in the following format:\n"
                "```python\n# YOUR CODE HERE\n```" + END
            ],
        ),
        (
            "swe-bench",
            {"problem_statement": "It fails.", "repo": "a/b"},
            ["Problem Statement:\nIt fails.\nPlease fix the issue described above."],
        ),
        ("mt-bench", {"prompt": ["One?", "Two?"], "category": "math"}, ["One?", "Two?"]),
        ("mt-bench", {"question_id": 81, "turns": ["One?", "Two?"]}, ["One?", "Two?"]),
        ("alpaca", {"instruction": "Sort.", "input": "b a", "output": "a b"}, [
            "Sort.\n\nInput:\nb a"
        ]),
        ("alpaca", {"instruction": "Sort.", "input": "", "output": "a b"}, ["Sort."]),
    ],
)  # fmt: skip
def test_raw_records_become_the_known_prompts(
    tmp_path: Path, name: str, record: dict[str, Any], asked: list[str]
) -> None:
    source = composed("bench=standard").bench.suite[name]
    path = str(write_lines(tmp_path / "raw.jsonl", record))
    (found,) = load(replace(source, path=path), name)
    asks = asks_of(found)
    assert [[(m["role"], m["content"]) for m in ask] for ask in asks] == [
        [("user", text)] for text in asked
    ]


@pytest.mark.parametrize("name", TEN)
def test_shipped_samples_are_in_the_raw_schema(name: str) -> None:
    source = composed("bench=standard").bench.suite[name]
    path = SHIPPED / f"{name}.jsonl"
    found = load(replace(source, path=str(path)), name)
    assert 4 <= len(found) == len(path.read_text().splitlines()) <= 6
    assert len({record["id"] for record in found}) == len(found)
    assert {len(asks_of(record)) for record in found} == {2 if name == "mt-bench" else 1}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "no list"}, "no `prompt` list"),
        ({"prompt": []}, "no `prompt` list"),
        ([], "no `prompt` list"),
    ],
)
def test_what_is_no_prompt_is_set_aside(tmp_path: Path, record: Any, reason: str) -> None:
    path = write_lines(tmp_path / "raw.jsonl", record)
    with pytest.raises(InputError, match=reason):
        load(Source(str(path), "mt-bench"), "x")


def test_shuffle_is_that_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"task {number}"} for number in range(50)]
    path = write_lines(tmp_path / "raw.jsonl", *rows)
    theirs = datasets.Dataset.from_list(rows).shuffle(seed=3).select(range(7))["prompt"]
    ours = load(Source(str(path), "mbpp", shuffle=3, limit=7), "x")
    assert [record["conversations"][0]["content"] for record in ours] == list(theirs)
    same = load(Source(str(path), "mbpp", limit=7), "x")
    assert [record["conversations"][0]["content"] for record in same] != list(theirs)


def test_files_of_the_hub_are_spelt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spelt_out("test{,2}.jsonl") == ["test.jsonl", "test2.jsonl"]
    monkeypatch.chdir(tmp_path)
    for name in ("test", "test2"):
        write_lines(Path(f"own/set/{name}.jsonl"), {"prompt": f"of {name}"})
    found = load(Source("hub:own/set/test{,2}.jsonl", "mbpp"), "x")
    assert [r["conversations"][0]["content"] for r in found] == ["of test", "of test2"]


def test_a_shuffled_split_of_the_hub_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": f"task {number}", "code": "x"} for number in range(9)]
    write_lines(Path("own/set/train.jsonl"), *rows)
    found = load(Source("hub:own/set:train", "mbpp", shuffle=0, limit=3), "x")
    local = load(Source("own/set/train.jsonl", "mbpp", shuffle=0, limit=3), "x")
    assert found == local


def test_the_groups_on_the_command_line() -> None:
    held_out, own = composed(), composed("experiment=quickstart")
    assert not held_out.bench.suite and not own.bench.suite
    assert held_out.bench.turns == own.bench.turns == "first"
    standard = composed("experiment=quickstart", "bench=standard").bench
    assert list(standard.suite) == TEN
    assert (standard.turns, standard.average, standard.max_tokens) == ("all", "conversations", 96)
    assert composed("bench=standard").bench.max_tokens == 512
    zlab = composed("bench=zlab", "model=qwen3_8b").bench
    assert zlab.suite == standard.suite
    assert (zlab.turns, zlab.average, zlab.thinking) == ("first", "responses", "off")
    assert (zlab.temperature, zlab.max_tokens, zlab.max_length) == (0.0, 2048, 40960)
    limits = [source.limit for source in zlab.suite.values()]
    assert limits == [128, 128, 30, 30, 164, 128, 128, 128, 80, 128]
    assert {source.shuffle for source in zlab.suite.values()} == {0}
    assert composed("bench.thinking=on").bench.thinking == "on"
    with pytest.raises(InputError, match=r"bench\.only=gsm9k.*gsm8k"):
        composed("bench=standard", "bench.only=[gsm9k]")
    with pytest.raises(InputError, match=r"bench\.samples=x.*auto, hub, shipped"):
        composed("bench.samples=x")


def test_samples_stand_in_for_all_of_the_hub_or_for_none(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests have no hub; a folder of the same name stands in for a part of it."""
    monkeypatch.chdir(tmp_path)
    cfg.bench.suite = composed("bench=standard").bench.suite
    cfg.bench.only = ["livecodebench", "gsm8k"]
    first = "livecodebench/code_generation_lite/test"
    for number in ("", "2", "3", "4", "5", "6"):
        write_lines(Path(f"{first}{number}.jsonl"), {"question_content": f"Question {number}"})
    cfg.bench.only = ["livecodebench"]
    found = bench_sets(cfg)
    assert len(found.records["livecodebench"]) == 6 and found.why is None
    assert found.origins["livecodebench"].startswith("hub:")
    cfg.bench.only = ["livecodebench", "gsm8k"]
    found = bench_sets(cfg)
    assert found.origins == {"livecodebench": "shipped", "gsm8k": "shipped"}
    assert found.why is not None and "hub:openai/gsm8k/main:test cannot be read" in found.why
    cfg.bench.samples = "hub"
    with pytest.raises(InputError, match=r"hub:openai/gsm8k/main:test cannot be read"):
        bench_sets(cfg)
    own = write_lines(tmp_path / "mine.jsonl", {"question": "Mine?"})
    cfg.bench.suite["gsm8k"] = replace(cfg.bench.suite["gsm8k"], path=str(own))
    assert len(bench_sets(cfg).records["livecodebench"]) == 6
    cfg.bench.samples = "shipped"
    found = bench_sets(cfg)
    assert found.origins == {"livecodebench": "shipped", "gsm8k": str(own)}
    assert len(found.records["gsm8k"]) == 1 and found.why is None
    cfg.bench.samples = "auto"
    own.unlink()
    with pytest.raises(InputError, match=r"mine\.jsonl does not exist"):
        bench_sets(cfg)


@pytest.fixture
def exported(cfg: Config, tokens: Path) -> Config:
    """A configuration whose draft is trained for a moment and exported."""
    cfg.max_steps, cfg.max_length, cfg.preprocess.force = 3, 512, True
    cfg.bench.max_tokens, cfg.bench.bootstrap = 6, 50
    preprocess(cfg)
    train(cfg)
    export(cfg)
    return cfg


@pytest.mark.slow
def test_ten_rows_without_a_network(exported: Config, tmp_path: Path) -> None:
    """As a user types it, with samples so short that every one fits."""
    done = warm.run(
        [
            str(ROOT / "bench.py"), "experiment=quickstart", "bench=standard",
            "loss=baseline", "run_name=test", "data=synthetic", "bench.max_tokens=6",
            f"paths.checkpoints={exported.paths.checkpoints}", "bench.bootstrap=20",
            f"paths.datasets={exported.paths.datasets}", "draft.ttt_length=3", "device=cpu",
        ],
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("data set"))
    assert lines[head - 1].startswith("prompts: shipped samples, comparable with nothing (offline:")
    rows = [line.split() for line in lines[head + 1 : head + 11]]
    assert [row[0] for row in rows] == TEN
    assert {row[-1] for row in rows} == {"yes"}
    assert lines[head + 11].startswith("average tau")
    assert "left out" not in done.stdout and "published" not in done.stdout
    assert not paths.bench_file(exported).exists()
    exported.bench.name = "standard"
    result = json.loads(paths.bench_file(exported).read_text())
    assert {d["source"] for d in result["datasets"].values()} == {"shipped"}
    assert result["settings"]["samples"] == "auto" and "cannot be read" in result["samples_because"]
    talks = result["datasets"]["mt-bench"]
    assert (talks["prompts"], talks["responses"], len(talks["lengths"])) == (5, 10, 5)


@pytest.mark.slow
def test_long_prompts_of_a_suite_are_counted_and_others_refused(
    exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [{"prompt": ["Hi?", "And then? " * 200]}, {"prompt": ["Long? " * 400]}]
    source = Source(str(write_lines(tmp_path / "raw.jsonl", *tasks)), "mt-bench")
    long = Source(str(write_lines(tmp_path / "long.jsonl", *tasks[1:])), "mt-bench")
    cfg = deepcopy(exported)
    cfg.bench.suite, cfg.bench.turns = {"talks": source, "long": long}, "all"
    bench(cfg)
    result = json.loads(paths.bench_file(cfg).read_text())
    assert result["left_out"] == {"talks": 1, "talks (later turns)": 1, "long": 1}
    assert list(result["datasets"]) == ["talks"]
    said = capsys.readouterr().out
    assert "prompts: the suite's own\n" in said
    assert "refused by the chat template: talks 1, talks (later turns) 1, long 1" in said
    cfg.bench.suite, cfg.bench.force = {"long": long}, True
    with pytest.raises(InputError, match=r"no prompt fits max_length=512 with bench.max_tokens=6"):
        bench(cfg)
    cfg.bench.suite, cfg.bench.datasets = {}, {"talks": source}
    with pytest.raises(InputError, match=r"data set talks: the prompt \w+ has \d+ tokens"):
        bench(cfg)
    cfg.bench.max_length = 2048
    assert bench(cfg) >= 1


def test_the_second_turn_follows_the_own_answer(exported: Config) -> None:
    """The prompt of turn 2 holds what the model said to turn 1; both describe the tools."""
    seen: list[list[dict[str, Any]]] = []
    tools = [{"name": "look"}]

    class Watched(Asking):
        def encode(self, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
            seen.append(list(messages))
            assert tools == talk.tools
            return super().encode(messages, tools)

    setup = asking_of(exported, load_tokenizer(exported.model), None)
    pair = load_pair(exported, paths.export_dir(exported), exported.bench.dtype)
    narrow = load_pair(exported, paths.export_dir(exported), "bfloat16").draft
    assert narrow.fc.weight.dtype == torch.bfloat16
    assert narrow.rotary.inv_freq.equal(pair.draft.rotary.inv_freq)  # no weight is not rounded
    asks = [[{"role": "user", "content": text}] for text in ("Tell me a story.", "Go on.")]
    talk = Talk(asks, tools)
    watched = Watched(**vars(setup))
    first, second = converse(talk, watched, pair, torch.Generator().manual_seed(0))
    assert first.alone is not None and second.alone is not None
    assert (first.follows, second.follows) == (False, True)
    assert first.with_draft.tokens == first.alone.tokens
    assert second.with_draft.tokens == second.alone.tokens
    said = setup.decode(first.alone.tokens)
    assert said.strip()
    assert seen[1] == [*asks[0], {"role": "assistant", "content": said}, *asks[1]]
    without_room = replace(setup, room=len(setup.encode(asks[0])))
    assert len(converse(talk, without_room, pair, torch.Generator())) == 1


def test_recorded_answers_are_left_to_the_model() -> None:
    def said(*roles: str) -> dict[str, Any]:
        return {"conversations": [{"role": role, "content": role} for role in roles]}

    def roles(record: dict[str, Any]) -> list[list[str]]:
        return [[message["role"] for message in ask] for ask in asks_of(record)]

    assert roles(said("system", "user", "assistant")) == [["system", "user"]]
    talk = said("user", "assistant", "user", "assistant", "tool", "assistant", "user")
    assert roles(talk) == [["user"], ["user"], ["user"]]
    assert roles(said("user", "assistant", "tool", "user")) == [["user"], ["user"]]


def test_tools_are_described_as_in_training(cfg: Config) -> None:
    tokenizer, prompts = load_tokenizer(cfg.model), list[str]()
    tokenizer.chat_template = "{{ (tools or []) | tojson }}{{ messages[0]['content'] }}"
    user = {"role": "user", "content": "Hi"}
    tools = [{"name": "look"}]
    records = [{"id": n, "conversations": [user], "tools": tools} for n in ("a", "b")]
    asking = asking_of(cfg, tokenizer, None)
    found = fitting(BenchSets({"own": records}, {}), asking, cfg)["own"]

    async def client(prompt: list[int], _: Any) -> ServedAnswer:
        prompts.append(tokenizer.decode(prompt))
        return ServedAnswer(Generation([5], 1.0, [], []), 0)

    for talk in found:
        asyncio.run(ask_server(client, asking, talk, "own"))
    assert prompts == ['[{"name": "look"}]Hi'] * 2


@pytest.mark.parametrize(("thinking", "expected"), [("off", False), ("on", True), ("model", None)])
def test_the_thinking_switch_reaches_the_template(
    cfg: Config, thinking: str, expected: bool | None
) -> None:
    tokenizer = load_tokenizer(cfg.model)
    template = "{{ 'thinking ' ~ enable_thinking ~ ' ' }}{{ messages[0]['content'] }}"
    tokenizer.chat_template = template
    cfg.bench.thinking = thinking
    ids = asking_of(cfg, tokenizer, None).encode([{"role": "user", "content": "Hi"}])
    word = "" if expected is None else str(expected)
    assert tokenizer.decode(ids) == f"thinking {word} Hi"


def response(gained: list[int], accepted: list[int], follows: bool = False) -> PairedAnswer:
    tokens = list(range(1 + sum(gained)))
    with_draft = Generation(tokens, 1.0, gained, accepted)
    return PairedAnswer(with_draft, Generation(tokens, 2.0), 0.0, follows)


def test_two_ways_to_average() -> None:
    requests = [
        response([1], [0]),
        response([4, 1], [3, 2]),  # the answer ended in the second verification
        response([2, 2, 2], [1, 1, 1], follows=True),
    ]
    ours = summarise(requests, 3, 10, True)
    assert (ours["prompts"], ours["responses"]) == (2, 3)
    assert ours["lengths"] == [1.0, 11 / 5]
    assert ours["accepted_length"] == (11 / 5 + 1) / 2
    zlab = summarise(requests, 3, 10, True, "responses")
    assert zlab["lengths"] == [1.0, 3.5, 2.0]
    assert zlab["accepted_length"] == pytest.approx(6.5 / 3)
    assert ours["accepted_length_pooled"] == zlab["accepted_length_pooled"] == 12 / 6
    assert ours["gained"] == [2, 3, 0, 1]
    assert ours["gained_at_least"] == {"3": 1 / 6, "5": 0.0}
    known = [requests[0], replace(requests[1], overlap=1.0), requests[2]]
    assert summarise(known, 3, 10, True)["novel"]["accepted_length"] == (2 + 1) / 2
