"""Published figures: every entry is whole, and none stands beside another setting's measurement."""

from copy import deepcopy
from typing import Any

import pytest
from omegaconf import OmegaConf

from specforge_exp.bench.published import FILE, figures, same_setting, setting_of

KEYS = {"draft", "temperature", "thinking", "max_tokens", "average", "turns"}
RESULT: dict[str, Any] = {
    "target": "Qwen/Qwen3-8B",
    "settings": {
        "chain_length": 15, "temperature": 0.0, "max_tokens": 2048, "average": "responses",
        "turns": "first", "thinking": "off",
    },
    "config": {
        "draft": {"name": "dflash", "block_size": 16}, "model": {"chat_template_kwargs": {}},
    },
    "datasets": {
        "gsm8k": {
            "source": "hub:openai/gsm8k/main:test", "accepted_length": 6.1, "prompts": 128,
            "accepted_length_ci95": [5.9, 6.3],
        },
    },
}  # fmt: skip


def test_every_entry_is_well_formed() -> None:
    raw: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    needed = {"system", "model", "method", "setting", "source", "figures"}
    for entry in raw:
        assert needed <= set(entry) <= needed | {"note"}, entry
        assert all(entry[key] for key in needed)
        setting = entry["setting"]
        assert set(setting) == KEYS, entry
        assert setting["draft"].split()[0] in ("block", "chain", "tree", "unknown")
        assert setting["temperature"] in (0.0, 1.0, "unknown")
        assert setting["thinking"] in ("on", "off", None, "unknown")
        assert setting["average"] in ("responses", "pooled", "unknown")
        assert setting["turns"] in ("all", "first", "unknown")
        assert isinstance(setting["max_tokens"], int) or setting["max_tokens"] == "unknown"
        for found in entry["figures"].values():
            assert found and set(found) <= {"tau", "speedup"}
            for value in found.values():
                low, high = value if isinstance(value, list) else (value, value)
                assert isinstance(low, float) and 1 <= low <= high < 20
    flat = [
        (f.system, f.model, f.method, str(f.setting), f.data_set, f.source, str(f.tau))
        for f in figures()
    ]
    assert len(set(flat)) == len(flat) > 100


def test_some_known_figures() -> None:
    def tau(system: str, model: str, data_set: str, temperature: float) -> list[Any]:
        return [
            f.tau
            for f in figures()
            if (f.system, f.model, f.data_set) == (system, model, data_set)
            and f.setting["temperature"] == temperature
            and f.setting["thinking"] == "off"
        ]

    assert tau("z-lab DFlash", "Qwen/Qwen3-8B", "math500", 0.0) == [7.87]
    assert tau("z-lab DFlash", "Qwen/Qwen3-8B", "math500", 1.0) == [6.40]
    assert tau("z-lab DFlash", "Qwen/Qwen3-4B", "average", 0.0) == [6.54]


def test_the_same_setting_is_printed() -> None:
    assert same_setting(RESULT) == [
        "ours / published, same setting:",
        "  gsm8k: 6.10 (5.90-6.30, 128 prompts) / 6.54 (z-lab DFlash, DFlash paper, table 1)",
    ]
    by_template = deepcopy(RESULT)
    by_template["settings"]["thinking"] = "model"
    assert same_setting(by_template) == []
    by_template["config"]["model"]["chat_template_kwargs"]["enable_thinking"] = False
    assert same_setting(by_template) == same_setting(RESULT)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("target",), "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (("target",), "/models/tiny_target"),
        (("config", "draft", "name"), "eagle3"),
        (("config", "draft", "block_size"), 8),
        (("settings", "chain_length"), 7),
        (("settings", "temperature"), 0.5),
        (("settings", "max_tokens"), 256),
        (("settings", "average"), "conversations"),
        (("settings", "thinking"), "on"),
        (("datasets", "gsm8k", "source"), "shipped"),
        (("datasets", "gsm8k", "source"), "gsm8k.jsonl"),
    ],
)
def test_another_setting_prints_nothing(path: tuple[str, ...], value: Any) -> None:
    other = deepcopy(RESULT)
    node = other
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert same_setting(other) == []


def test_turns_matter_to_mt_bench_only() -> None:
    talks = deepcopy(RESULT)
    talks["datasets"] = {"mt-bench": talks["datasets"]["gsm8k"]}
    assert same_setting(talks) == []
    talks["settings"]["turns"] = "all"
    assert "4.24" in same_setting(talks)[1]


@pytest.mark.slow
def test_a_chain_stands_beside_no_tree() -> None:
    eagle = deepcopy(RESULT)
    eagle["config"]["draft"] = {"name": "eagle3"}
    for chain in range(1, 61):
        eagle["settings"]["chain_length"] = chain
        assert setting_of(eagle)["draft"] == f"chain {chain}"
        assert same_setting(eagle) == []
