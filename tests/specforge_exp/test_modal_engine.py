"""engine=modal against a local Modal: exactly once, whatever dies."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import REPOSITORY, local_modal_of_forks
from modal_app import regen_driver
from modal_app.regen_driver import CHUNK, COMMAND, CRASH, POISON, REFUSED, config, write_prompts
from modal_local.client import LocalModal
from test_stages_on_modal import launch


@pytest.fixture(scope="module")
def modal_here(shared_with_jobs: Path) -> Iterator[LocalModal]:
    """A control plane for programs of these tests only."""
    options = {"max_containers": 3, "retry_delay_scale": 0, "max_idle": 20.0}
    with local_modal_of_forks([shared_with_jobs], **options) as local:
        yield local
        assert local.state()["unimplemented"] == {}


def drive(modal: LocalModal, *arguments: object, **more: str) -> warm.Started:
    """Start the driver."""
    environment = {**os.environ, **modal.env, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment |= more
    words = [regen_driver.__file__, *map(str, arguments)]
    return warm.start(words, env=environment, together=True, kind="stages")


def finish(process: warm.Started, expect: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expect, output
    return output


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / "datasets" / "small--tiny" / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice(
    modal_here: LocalModal, tmp_path: Path, shared_with_jobs: Path
) -> None:
    """The client is killed 20 times, containers twice, four results expire, two prompts are bad."""
    texts = [f"Describe kettle {number}." for number in range(81)]
    texts[13] += " " + POISON
    texts[42] += " " + REFUSED
    write_prompts(config(tmp_path, 0), texts)
    hold = shared_with_jobs / "answers"
    hold.write_text(str(2 * CHUNK))
    process = drive(modal_here, tmp_path, len(texts), 0, 20, HOLD_ANSWERS=str(hold))
    killed: set[str] = set()
    expired: set[str] = set()

    def harmed(state: dict[str, Any]) -> bool:
        """Two containers that stand still are killed, each behind chunks whose results expire."""
        done = [name for name, call in state["calls"].items() if call["done"]]
        busy = [name for name, task in state["tasks"].items() if task["running"]]
        for call in [name for name in done if name not in expired][: 4 - len(expired)]:
            expired.add(call)
            modal_here.expire(call)
        if busy and len(done) >= 2 * len(killed) + 2 and not killed & {*busy}:
            killed.add(busy[0])
            modal_here.kill(busy[0])
            hold.write_text(str(2 * CHUNK * (len(killed) + 1)))
        return (len(killed), len(expired)) == (2, 4)

    modal_here.wait_for(harmed)
    hold.unlink()
    output = finish(process)
    assert "killed 20 times" in output
    assert "input 81 = done 79 + failed 2 + skipped 0" in output
    answered = lines(tmp_path, "train.jsonl")
    assert [r["id"] for r in answered] == [f"c{n}" for n in range(80) if n not in (13, 42)]
    assert [r["id"] for r in lines(tmp_path, "eval.jsonl")] == ["c80"]
    failed = {record["id"]: record["error"] for record in lines(tmp_path, "failed.jsonl")}
    assert failed == {
        "c13": "the server dies, with nothing else", "c42": "HTTP 400: not this one"
    }  # fmt: skip
    for number, record in zip([int(r["id"][1:]) for r in answered], answered, strict=True):
        prompt, answer = record["conversations"]
        assert prompt["content"] == texts[number]
        assert answer["content"] == f"answer to {texts[number]}"
    left = sorted(path.name for path in (tmp_path / "datasets" / "small--tiny").iterdir())
    assert left == ["eval.jsonl", "failed.jsonl", "run.json", "train.jsonl"]


@pytest.mark.slow
def test_the_volume_answers_for_expired_calls(modal_here: LocalModal, tmp_path: Path) -> None:
    """The client is gone, the calls end, their results expire: nothing is computed again."""
    texts = [f"Describe lamp {number}." for number in range(2 * CHUNK + 1)]
    write_prompts(config(tmp_path, 1), texts)
    before = set(modal_here.state()["calls"])
    finish(drive(modal_here, tmp_path, len(texts), 1, 1, "spawned"))
    journal = tmp_path / "datasets" / "small--tiny.partial" / "calls.jsonl"
    calls = [json.loads(line)["call"] for line in journal.read_text().splitlines()]
    assert len(calls) == 3 and set(modal_here.state()["calls"]) - before == set(calls)
    modal_here.wait_for(lambda state: all(state["calls"][call]["done"] for call in calls))
    for call in calls:
        modal_here.expire(call)
    assert "input 17 = done 17" in finish(drive(modal_here, tmp_path, len(texts), 1, 0))
    assert set(modal_here.state()["calls"]) - before == set(calls)


@pytest.mark.slow
def test_asked_to_end_it_leaves_the_calls(modal_here: LocalModal, tmp_path: Path) -> None:
    texts = [f"Describe a jar {number}." for number in range(2 * CHUNK + 1)]
    texts[5] = "word " * 400
    write_prompts(config(tmp_path, 2), texts)
    before = set(modal_here.state()["calls"])
    hold = tmp_path / "hold"
    hold.touch()
    process = drive(modal_here, tmp_path, len(texts), 2, 0, HOLD=str(hold))
    modal_here.wait_for(lambda state: len(set(state["calls"]) - before) == 3)
    [client_pid] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(client_pid), signal.SIGTERM)
    output = finish(process, expect=-signal.SIGTERM)
    assert "regen: stopped; 3 calls go on at Modal" in output, output
    assert "input 17 = done 16 + failed 1" in finish(drive(modal_here, tmp_path, 17, 2, 0))
    [failed] = lines(tmp_path, "failed.jsonl")
    assert failed["id"] == "c5" and failed["error"].endswith("tokens, max_length=256")
    assert len(set(modal_here.state()["calls"]) - before) == 3


BROKEN = {
    "no room for the model": "print('no room for the model'); raise SystemExit(4)",
    "HTTP 404": (
        "import sys; from aiohttp import web; app = web.Application();"
        "app.router.add_get('/health', lambda r: web.Response());"
        "web.run_app(app, host='127.0.0.1', port=int(sys.argv[1]))"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("message", BROKEN)
def test_a_server_that_never_works_is_no_endless_loop(
    message: str, modal_here: LocalModal, tmp_path: Path
) -> None:
    texts = [f"Describe a door {number}." for number in range(3)]
    write_prompts(config(tmp_path, 3), texts)
    command = ["python", "-c", BROKEN[message], "{port}"]
    output = finish(drive(modal_here, tmp_path, len(texts), 3, 0, *command), expect=1)
    assert "error: the containers of specforge-regen-" in output
    assert message in output and "modal app logs specforge-regen-" in output
    if message == "HTTP 404":  # another command is another server, and its answers are others
        refused = finish(drive(modal_here, tmp_path, len(texts), 3, 0), expect=1)
        assert "engine.command was" in refused and "regen.force=true" in refused


@pytest.mark.slow
def test_a_conversation_that_takes_containers_along(tmp_path: Path) -> None:
    texts = [f"Describe a bell {number}." for number in range(4)]
    texts[1] += " " + CRASH
    write_prompts(config(tmp_path, 4), texts)
    with local_modal_of_forks([], max_containers=2, crash_retries=0) as modal:
        output = finish(drive(modal, tmp_path, len(texts), 4, 0))
    assert "input 4 = done 3 + failed 1" in output
    [failed] = lines(tmp_path, "failed.jsonl")
    assert failed["id"] == "c1"
    assert re.match(r"the container dies \(.*\), with nothing else", failed["error"])


@pytest.mark.slow
def test_the_client_runs_on_modal_too(on_local_modal: LocalModal, tmp_path: Path) -> None:
    """A job on a CPU that starts the containers with the servers and waits for them."""
    smoke = ["experiment=smoke", "model=tiny", "hydra/launcher=modal", "data.name=fanned"]
    words = ["python", "-m", "specforge_exp.generation.local.serve", *COMMAND[3:]]
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


def test_what_is_deleted_at_the_end_is_the_runs_own(tmp_path: Path) -> None:
    """Two data sets that are regenerated in the same way at the same time."""
    from specforge_exp.generation.modal_engine import Client
    from specforge_exp.generation.store import Store

    cfg, folders = config(tmp_path, 0), set()
    for name in ("one", "two"):
        source = tmp_path / name / "train.jsonl"
        source.parent.mkdir()
        source.write_text("")
        store = Store(source.parent, {source: name}, CHUNK, None, 1)
        folders.add(Client(cfg, store, "app").folder)
        store.close()
    assert len(folders) == 2


def test_what_was_given_up_is_not_taken_again(tmp_path: Path) -> None:
    """Results on the Volume are of one run: regen.force=true, given because those before were of
    another image, say, gets none of them; a start that continues finds its own."""
    from specforge_exp.generation.modal_engine import Client
    from specforge_exp.generation.store import Store

    cfg, source = config(tmp_path, 0), tmp_path / "train.jsonl"
    source.write_text("")
    store = Store(tmp_path, {source: "one"}, CHUNK, None, 1)
    first = Client(cfg, store, "app")
    first.journal.write({"chunk": "a", "part": "a-1", "places": [0], "call": "fc-1"})
    first.journal.write({"part": "a-1", "seconds": 1.0})
    assert Client(cfg, store, "app").folder == first.folder
    first.journal.path.unlink()  # as regen.force=true
    assert Client(cfg, store, "app").folder != first.folder
    older = '{"chunk": "a", "part": "a-1", "places": [0], "call": "fc-1"}\n'
    first.journal.path.write_text(older)  # begun before runs had names
    assert Client(cfg, store, "app").journal.run == ""
    store.close()


def test_an_app_for_everything_that_differs_in_its_containers(tmp_path: Path) -> None:
    from specforge_exp.generation.modal_app import app_name

    cfg = config(tmp_path, 0)
    cfg.engine.tp_size = 1
    name = app_name(cfg)
    for field, value in {"num_servers": 7, "usd_per_gpu_hour": 1.0, "rate_limit": 2.0}.items():
        setattr(cfg.engine, field, value)
        assert app_name(cfg) == name
    names = {name}
    for field, value in {"tp_size": 2, "gpu": "H200", "args": {"a": 1}, "concurrency": 3}.items():
        setattr(cfg.engine, field, value)
        names.add(app_name(cfg))
    cfg.model.path = "Qwen/Qwen3-8B"
    names.add(app_name(cfg))
    assert len(names) == 6


def test_a_model_that_is_not_on_the_volume_yet(
    on_local_modal: LocalModal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every container would download it: the command that does it once is named."""
    from modal_sweep.client.volumes import volume
    from specforge_exp.generation import modal_app, modal_worker

    cfg = config(tmp_path, 0)
    cfg.model.path = "Qwen/Qwen3-8B"
    asyncio.run(modal_app.warn_of_downloads(cfg))
    assert "python prefetch.py -m" in caplog.text
    caplog.clear()
    marker = "prefetched/models--Qwen--Qwen3-8B"
    asyncio.run(modal_worker.write(volume("hf"), marker, b""))
    asyncio.run(modal_app.warn_of_downloads(cfg))
    assert not caplog.text


@pytest.mark.slow
def test_without_a_token_it_names_what_runs_without_modal(tmp_path: Path) -> None:
    """The client's own text asks for a command that is not the one to run."""
    environment = {**os.environ, "MODAL_CONFIG_PATH": str(tmp_path / "none")}
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_SERVER_URL"):
        environment.pop(name, None)
    options = ["experiment=quickstart", "data.sample_size=20"]
    options += [f"paths.datasets={tmp_path}", f"paths.checkpoints={tmp_path / 'runs'}"]
    for stage, more in (("prep", []), ("regen", ["engine=modal", "engine.tp_size=1"])):
        command = [sys.executable, str(REPOSITORY / f"{stage}.py"), *options, *more]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "`modal setup` logs in" in done.stderr and "regen.dry_run=true" in done.stderr
    assert "modal token new" not in done.stderr
