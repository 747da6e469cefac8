"""trainer.profile and trainer.dump: files of the steps that were asked for, and the same losses."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specforge_exp import paths
from specforge_exp.config import Config, InputError, TrainerConfig
from specforge_exp.stages.train import train


@pytest.mark.slow
def test_a_profile_and_a_dump_change_no_number(cfg: Config, tokens: Path) -> None:
    cfg.max_steps = 4
    plain = train(cfg)
    weights = load_file(paths.run_dir(cfg) / "step-000004" / "draft.safetensors")
    cfg.run_name, cfg.trainer.profile, cfg.trainer.dump = "watched", [1, 2], [1, 4]
    assert train(cfg) == plain
    folder = paths.run_dir(cfg)
    assert (
        json.loads((folder / "run.json").read_text())["settings"]
        .keys()
        .isdisjoint({"trainer.profile", "trainer.dump"})
    )
    [trace] = (folder / "profile").iterdir()
    assert trace.name == "step-000001-rank0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    names = [path.name for path in sorted((folder / "dump").iterdir())]
    assert names == ["step-000001-rank0.safetensors", "step-000004-rank0.safetensors"]
    first, last = (load_file(folder / "dump" / name) for name in names)
    ids = first["sample0.ids_T"]
    assert first["sample0.aux_TA"].shape[0] == len(ids) == int(first["sample0.lengths"].sum())
    moved = [k for k in first if k.startswith("draft.") and not torch.equal(first[k], last[k])]
    assert moved and all(key.removeprefix("draft.") in weights for key in moved)


@pytest.mark.parametrize("window", [[1], [-1, 2], [1, 0]])
def test_a_window_has_a_start_and_a_length(window: list[int]) -> None:
    with pytest.raises(InputError, match=r"trainer\.profile=.*\[start, steps\]"):
        TrainerConfig(profile=window)
