"""What a config.json says of a rotary embedding, and who looks."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from families import longrope

from specforge_exp.bench import in_process
from specforge_exp.causal.model import new_model
from specforge_exp.config import Config, ModelConfig
from specforge_exp.drafts.eagle3 import Eagle3
from specforge_exp.errors import InputError
from specforge_exp.target.files import check_rotary, text_config

PLAIN = {"rope_type": "default", "rope_theta": 1e6}
SCALED = {"rope_type": "linear", "factor": 2.0}


def other_rotary(cfg: Config, to: Path, **entries: Any) -> Path:
    """The tiny target with these in its config.json."""
    shutil.copytree(cfg.model.path, to)
    content = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(content | entries))
    return to


def test_bench_looks_at_its_own_length(cfg: Config, tmp_path: Path) -> None:
    """From 128 tokens on this target rotates otherwise."""
    cfg.model.path = str(other_rotary(cfg, tmp_path / "long", rope_parameters=longrope(32)))
    cfg.max_length, cfg.bench.max_length = 128, 129
    asking: Any = None
    with pytest.raises(InputError, match=r"^bench.max_length=129, .*use bench.max_length=128 or"):
        in_process.answer(cfg, asking, {})


@pytest.mark.parametrize(
    ("alike", "entries"),
    [
        (True, {"rope_scaling": None, "rope_parameters": PLAIN, "rope_theta": 1e4}),
        (True, {"rope_scaling": SCALED, "rope_theta": 1e6, "rope_parameters": PLAIN | SCALED}),
        (False, {"rope_scaling": SCALED, "rope_parameters": {"a": SCALED, "b": PLAIN}}),
        (False, {"rope_scaling": SCALED, "rope_theta": 1e6, "rope_parameters": PLAIN}),
        (False, {"rope_scaling": SCALED, "rope_parameters": PLAIN | SCALED}),  # without its base
        (False, {"rope_scaling": {**SCALED, "factor": 4.0}, "rope_parameters": SCALED}),
        (False, {"text_config": {"rope_scaling": SCALED, "rope_parameters": PLAIN}}),
    ],
)
def test_one_rotary_embedding(tmp_path: Path, alike: bool, entries: dict[str, Any]) -> None:
    """Engines take the older spelling, where there is one, and ours of a draft the newer."""
    (tmp_path / "config.json").write_text(json.dumps(entries))
    if alike:
        check_rotary(tmp_path)
        return
    with pytest.raises(InputError, match=r"rope_scaling={.*linear.* is not rope_parameters={"):
        check_rotary(tmp_path)


def test_two_rotary_embeddings_are_refused_wherever_one_is_read(
    cfg: Config, tmp_path: Path
) -> None:
    """Of a target, of any model whose weights are read, and of a draft in any layout."""
    two = other_rotary(cfg, tmp_path / "two", rope_scaling=SCALED, rope_parameters=PLAIN)
    model = ModelConfig(name="t", path=str(two))
    for read in (
        lambda: text_config(model),
        lambda: new_model(model, 0),
        lambda: new_model(replace(model, init="random"), 0),
        lambda: Eagle3.opened(two, 8),
    ):
        with pytest.raises(InputError, match=r"rope_parameters=\{.* rope_scaling=|rope_scaling=\{"):
            read()


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope", [{"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 8.0}, "yarn"]
)
def test_half_a_rotary_embedding(cfg: Config, tmp_path: Path, name: str, rope: Any) -> None:
    """In one line, whoever reads it."""
    model = ModelConfig("t", str(other_rotary(cfg, tmp_path / "half", **{name: rope})))
    for read in (text_config, partial(new_model, seed=0)):
        with pytest.raises(InputError, match=r"cannot be loaded as a folder: .*rope_") as error:
            read(model)
        assert "\n" not in str(error.value)
