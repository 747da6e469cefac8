"""A worker by itself: it judges proposals as the process that has the target, whatever it has had
to forget, and keeps traces of calls."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_config

from specforge_exp.artifacts import model_digest
from specforge_exp.config import TargetConfig
from specforge_exp.errors import InputError
from specforge_exp.inference import worker
from specforge_exp.inference.states import tensor_of, unpacked
from specforge_exp.onpolicy.judges import Here
from specforge_exp.paths import run_dir
from specforge_exp.target import Target


@pytest.mark.parametrize("kept", [2**16, 40, 1])
def test_a_worker_and_this_process(
    tmp_path: Path, tiny_target: Target, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """With room for all texts, for one of them, and for less than one."""
    monkeypatch.setattr(worker, "KEPT_TOKENS", kept)
    own = worker.TargetWorker(make_config(tmp_path), torch.get_num_threads(), "")
    texts = [torch.arange(3, 33), torch.arange(500, 520)]
    anchors = [torch.tensor([4, 20]), torch.tensor([7])]
    chains = [torch.arange(6).view(3, 2), torch.arange(9, 12).view(3, 1)]
    here = Here(tiny_target)
    states, caches = here.read(texts, True)
    expected = here.verify(caches, anchors, chains)
    ids = [ids_T.numpy().astype(np.int32) for ids_T in texts]
    for one, (aux_TA, last_TH) in zip(ids, states, strict=True):
        read = unpacked(own.read(one, True), torch.float32, 128)
        assert read[0].equal(aux_TA) and read[1].equal(last_TH)
    for one, anchor_R, tokens_JR, last_JRH in zip(ids, anchors, chains, expected, strict=True):
        data = own.verify(one, anchor_R.numpy(), tokens_JR.numpy())
        assert tensor_of(data, torch.float32).equal(last_JRH)
    assert not own.texts or kept == 1


def test_calls_of_a_worker_are_profiled(tmp_path: Path) -> None:
    """Those that are named, one trace for each."""
    cfg = make_config(tmp_path)
    cfg.target = TargetConfig(placement="ray", profile=[1, 2])
    own = worker.TargetWorker(cfg, torch.get_num_threads(), "")
    for _ in range(4):
        own.states([np.arange(9, dtype=np.int32)], "")
    traces = sorted((run_dir(cfg) / "profile").iterdir())
    assert [trace.name[:11] for trace in traces] == ["call-000001", "call-000002"]
    events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)


def test_a_worker_has_the_files_with_which_the_training_began(tmp_path: Path) -> None:
    """Where its machine has others, and when they are replaced before it is started again."""
    cfg = make_config(tmp_path)
    folder = tmp_path / "target"
    shutil.copytree(TINY.path, folder)
    cfg.model = replace(cfg.model, path=str(folder))
    digest = model_digest(str(folder))
    assert worker.TargetWorker(cfg, 1, "", digest=digest).target.parameters
    assert worker.TargetWorker(cfg, 1, "", digest="").target.parameters
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    with pytest.raises(InputError, match=rf"other files in model.path={folder} than the training"):
        _ = worker.TargetWorker(cfg, 1, "", digest=digest).target
