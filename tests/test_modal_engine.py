"""engine=modal against a local Modal: exactly once, whatever dies."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from modal_app import regen_driver
from modal_app.regen_driver import CHUNK, COMMAND, POISON, REFUSED, config, write_prompts
from modal_local import client
from modal_local.client import LocalModal
from test_stages_on_modal import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def modal_here() -> Iterator[LocalModal]:
    """A control plane for programs of these tests only."""
    options = {"max_containers": 3, "retry_delay_scale": 0, "max_idle": 20.0}
    with client.start(options=options) as local:
        yield local
        assert local.state()["unimplemented"] == {}


def drive(modal: LocalModal, *arguments: object) -> "subprocess.Popen[str]":
    """Start the driver."""
    environment = {**os.environ, **modal.env, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, regen_driver.__file__, *map(str, arguments)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", seconds: float = 170) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / "datasets" / "small--tiny" / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_nothing_is_lost_or_done_twice(modal_here: LocalModal, tmp_path: Path) -> None:
    """The client is killed 20 times, containers twice, four results expire, two prompts are bad."""
    texts = [f"Describe kettle {number}." for number in range(81)]
    texts[13] += " " + POISON
    texts[42] += " " + REFUSED
    write_prompts(config(tmp_path, 0), texts)
    process = drive(modal_here, tmp_path, len(texts), 0, 20)
    killed: set[str] = set()
    expired: set[str] = set()
    while process.poll() is None:
        state = modal_here.state()
        done = [name for name, call in state["calls"].items() if call["done"]]
        busy = [name for name, task in state["tasks"].items() if task["running"]]
        if len(killed) < 2 and busy and len(done) >= 2 * len(killed) + 1 and busy[0] not in killed:
            killed.add(busy[0])
            modal_here.kill(busy[0])
        for call in [name for name in done if name not in expired][: 4 - len(expired)]:
            expired.add(call)
            modal_here.expire(call)
        time.sleep(0.1)
    output = finish(process)
    assert "killed 20 times" in output and (len(killed), len(expired)) == (2, 4)
    assert "input 81 = done 79 + failed 2 + skipped 0" in output
    answered = lines(tmp_path, "train.jsonl")
    assert [r["id"] for r in answered] == [f"c{n}" for n in range(80) if n not in (13, 42)]
    assert [r["id"] for r in lines(tmp_path, "eval.jsonl")] == ["c80"]
    failed = {record["id"]: record["error"] for record in lines(tmp_path, "failed.jsonl")}
    assert failed == {
        "c13": "the server dies, with nothing else", "c42": "HTTP 400: not this one"
    }  # fmt: skip
    for number, record in zip([int(r["id"][1:]) for r in answered], answered, strict=True):
        asked, said = record["conversations"]
        assert asked["content"] == texts[number] and said["content"].strip()
    left = sorted(path.name for path in (tmp_path / "datasets" / "small--tiny").iterdir())
    assert left == ["eval.jsonl", "failed.jsonl", "run.json", "train.jsonl"]


def test_the_volume_answers_for_expired_calls(modal_here: LocalModal, tmp_path: Path) -> None:
    """The client is gone, the calls end, their results expire: nothing is computed again."""
    texts = [f"Describe lamp {number}." for number in range(2 * CHUNK + 1)]
    write_prompts(config(tmp_path, 1), texts)
    before = set(modal_here.state()["calls"])
    finish(drive(modal_here, tmp_path, len(texts), 1, 1, "spawned"))
    journal = tmp_path / "datasets" / "small--tiny.partial" / "calls.jsonl"
    calls = [json.loads(line)["call"] for line in journal.read_text().splitlines()]
    assert len(calls) == 3 and set(modal_here.state()["calls"]) - before == set(calls)
    modal_here.wait_for(lambda state: all(state["calls"][call]["done"] for call in calls), 60)
    for call in calls:
        modal_here.expire(call)
    assert "input 17 = done 17" in finish(drive(modal_here, tmp_path, len(texts), 1, 0))
    assert set(modal_here.state()["calls"]) - before == set(calls)


def test_the_client_runs_on_modal_too(on_local_modal: LocalModal, tmp_path: Path) -> None:
    """A job on a CPU that starts the containers with the servers and waits for them."""
    smoke = ["experiment=smoke", "model=tiny", "hydra/launcher=modal", "data.name=fanned"]
    words = ["python", "-m", "specforge_exp.generation.serve", *COMMAND[3:]]
    command = ",".join(f'"{word}"' if "{" in word else word for word in words)
    engine = ["engine=modal", "engine.image=debian_slim", f"engine.command=[{command}]"]
    for stage, more in (("prep", []), ("regen", engine)):
        done = launch(stage, tmp_path, *smoke, *more)
        assert done.returncode == 0, done.stderr
    [log] = (tmp_path / "checkpoints").rglob("regen.log")
    counts = re.search(r"input (\d+) = done (\d+) \+ failed 0 \+ skipped 0", log.read_text())
    assert counts is not None and counts[1] == counts[2] == "20"
    apps = [app["name"] for app in on_local_modal.state()["apps"].values()]
    assert any(name.startswith("specforge-regen-") for name in apps)
