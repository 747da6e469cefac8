"""Who serves a draft of which target is told before it is paid for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from specforge_exp.config import Config
from specforge_exp.drafts.engines import engines, serving, unserved


@pytest.mark.parametrize(
    ("draft", "architecture", "known"),
    [
        ("eagle3", "Qwen3ForCausalLM", ["vLLM 0.32", "SGLang 0.5.23"]),
        ("eagle3", "Gemma3ForConditionalGeneration", ["SGLang 0.5.23"]),
        ("dflash", "Gemma3ForConditionalGeneration", []),
        ("dflash", "Lfm2ForCausalLM", ["SGLang 0.5.23"]),
        ("peagle", "Lfm2ForCausalLM", []),
        ("dspark", "MadeTomorrowForCausalLM", ["vLLM 0.32"]),  # by transformers
        ("toy", "Qwen3ForCausalLM", []),
    ],
)
def test_who_serves_what(draft: str, architecture: str, known: list[str]) -> None:
    assert serving(draft, architecture) == known


def test_a_draft_that_nobody_serves_is_told(cfg: Config, tmp_path: Path) -> None:
    assert unserved(cfg) is None
    folder = shutil.copytree(cfg.model.path, tmp_path / "target")
    content = json.loads((folder / "config.json").read_text())
    content["architectures"] = ["Cohere2ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(content))
    cfg.model.path = str(folder)
    said = unserved(cfg) or ""
    assert "vLLM 0.32 and SGLang 0.5.23 have no draft=eagle3 for targets of Cohere2" in said
    for name in ("standalone", "toy"):
        assert unserved(replace(cfg, draft=replace(cfg.draft, name=name))) is None


def test_every_entry_says_one_of_both() -> None:
    assert all(("only" in entry) != ("not" in entry) and entry["drafts"] for entry in engines())
