"""A training whose target runs in a real vLLM: its numbers are those of transformers, but for the
last digits, whichever of its processes dies."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from ray_runs import DFLASH, RAY, begin, command_line, composed, prepared, processes, said
from test_ranks import listening, with_all_below
from test_resume import lines, wait_for_step
from vllm_servers import ENVIRONMENT, IN_ONE, PYTHON

from specforge_exp import paths
from specforge_exp.stages.train import train

pytestmark = pytest.mark.engines
SERVED = [
    "target.engine=vllm", f"target.python={PYTHON}",
    "+target.args.enforce_eager=true", "+target.args.max_num_seqs=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, and two trainings without workers."""
    folder = prepared(tmp_path_factory.mktemp("states"))
    train(composed(folder, "eagle3"))
    train(composed(folder, "dflash", *DFLASH))
    return folder


@pytest.mark.parametrize(
    ("draft", "more"),
    [("eagle3", ()), ("dflash", DFLASH), ("eagle3", ("target.tp_size=2",))],
    ids=["eagle3", "dflash", "two-processes"],
)
def test_a_training_on_the_states_of_vllm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, draft: str, more: tuple[str, ...]
) -> None:
    """DFlash's server runs a process less than installed, which is faster."""
    in_one = draft == "dflash"
    for key, value in (ENVIRONMENT | (IN_ONE if in_one else {})).items():
        monkeypatch.setenv(key, value)
    more += ("+target.args.distributed_executor_backend=uni",) * in_one
    name = f"{draft}-served-{len(more)}"
    cfg = composed(folder, name, *RAY, *more, *SERVED)
    process = begin(folder, name, *more, *SERVED)
    run = paths.run_dir(cfg)
    while "workers are ready" not in said(folder, name):
        assert process.poll() is None, said(folder, name)
        time.sleep(0.2)
    wait_for_step(process, cfg, name, 5)
    (server,) = processes(process.pid, "^[^ ]+ -m vllm.entrypoints")
    assert {end[-8:] for end in listening(with_all_below(process.pid))} == {"0100007F"}
    (states,) = re.findall(r'"shared_storage_path": "([^"]+)"', command_line(server))
    os.kill(server, signal.SIGKILL)
    assert process.wait(600) == 0, said(folder, name)
    text = said(folder, name)
    assert "asking again for states: InputError: vLLM does not answer (" in text
    (apart,) = re.findall(r"vllm's states differ from transformers' by (\S+) % of their size", text)
    assert 0 < float(apart) < 0.01
    own, served = lines(cfg, draft), lines(cfg, name)
    assert len(own) == len(served)
    for one, other in zip(own, served, strict=True):
        assert other["step"] == one["step"]
        (key,) = {"loss", "eval/loss"} & set(one)
        assert other[key] == pytest.approx(one[key], rel=1e-4)
    assert json.loads((run / "run.json").read_text())["settings"]["target.engine"] == "vllm"
    assert not Path(states).exists()
