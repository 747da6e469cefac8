"""Servers of our own: how many, with which command line, and that they never outlive us."""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from chat_shapes import SHAPES
from chat_templates import tokenizer_of
from conftest import REPOSITORY
from modal_app.regen_driver import COMMAND, POISON, REFUSED, write_prompts

from specforge_exp.config import Config, EngineConfig, ModelConfig
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import Request, Sampling, ServerDied
from specforge_exp.generation.rules import rules_of
from specforge_exp.generation.server_engine import ServerEngine, layout
from specforge_exp.serving import gpus
from specforge_exp.serving.command import answering, server_command
from specforge_exp.serving.gpus import count_servers, parameters, tp_size_of
from specforge_exp.stages.regen import describe, regen

QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288,
}  # fmt: skip
QWEN3_32B = QWEN3_8B | {
    "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64,
    "intermediate_size": 25600,
}  # fmt: skip
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 128256,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672,
}  # fmt: skip

STUB = """
import asyncio, os, subprocess, sys
from aiohttp import web

waiting = []
escaped = subprocess.Popen(["sleep", "1000"], start_new_session=True)
subprocess.Popen(["sleep", "1001"])
print("pids", os.getpid(), escaped.pid, flush=True)

async def chat(request):
    body = await request.text()
    if "wait" in body:
        waiting.append(body)
        await asyncio.sleep(600)
    if "die" in body:
        while len(waiting) < 2:
            await asyncio.sleep(0.01)
        os._exit(3)
    message = {"role": "assistant", "content": os.environ.get("CUDA_VISIBLE_DEVICES", "none")}
    return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})

async def models(request):
    return web.json_response({"data": [{"id": sys.argv[1]}]})

async def health(request):
    return web.Response()

app = web.Application()
app.add_routes([web.get("/health", health), web.get("/v1/models", models),
                web.post("/v1/chat/completions", chat)])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None)
"""


def free_port(count: int = 1) -> int:
    """The first of so many ports that nobody has, and that the kernel gives to nobody who asks for
    any before a server takes them."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    first, last = map(int, given)
    while True:
        port = random.choice([*range(10_000, first - count), *range(last + 1, 65_536 - count)])
        with ExitStack() as taken, suppress(OSError):
            for one in range(port, port + count):
                taken.enter_context(socket.socket()).bind(("127.0.0.1", one))
            return port


@pytest.mark.parametrize(
    ("family", "engine", "given"),
    [
        ("gpt-oss", EngineConfig(name="sglang"), "auto"),
        ("Gemma 4", EngineConfig(name="sglang"), "auto"),
        ("gpt-oss", EngineConfig(name="sglang", args={"reasoning_parser": "own"}), "own"),
        ("gpt-oss", EngineConfig(name="vllm"), None),
        ("Llama 3", EngineConfig(name="sglang"), None),
        ("Cohere 2", EngineConfig(name="sglang"), None),  # its marks hold the answer alone
    ],
)
def test_a_server_reads_what_a_model_marks_by_special_tokens(
    cfg: Config, monkeypatch: pytest.MonkeyPatch, family: str, engine: EngineConfig, given: str
) -> None:
    """By the template alone, thinking or not; what is given wins."""
    folder = shutil.copytree(cfg.model.path, Path(cfg.paths.datasets) / "model")
    tokenizer_of(next(each for each in SHAPES if each.name == family)).save_pretrained(folder)
    cfg.model.path = str(folder)
    monkeypatch.setattr(gpus, "visible_gpus", lambda: ["0"])
    cfg.engine = replace(engine, python=sys.executable, tp_size=1)
    (server,) = gpus.make_servers(cfg, folder)
    words = " ".join(server.command)
    assert (f"--reasoning-parser {given}" in words) if given else "parser" not in words
    marks = {"gpt-oss": "<|channel|>", "Gemma 4": "<channel|>"}
    assert marks.get(family) in (*rules_of(cfg).marks, None)


def test_what_answers_depend_on(cfg: Config) -> None:
    """Options of a server are part of a data set and of its records; what only makes room, and what
    another engine does not read, is not."""
    args = {"mem_fraction_static": 0.8, "quantization": "fp8"}
    options = {"args": args, "command": ["a"], "served_name": "b"}
    every = {**options, "args": {"quantization": "fp8"}}
    expected = {
        "transformers": {}, "sglang": every, "modal": every, "openai": {"served_name": "b"},
        "vllm": options,
    }  # fmt: skip
    for name, known in expected.items():
        urls = ["http://a/v1"] if name == "openai" else []
        cfg.engine = EngineConfig(name=name, urls=urls, **options)
        assert answering(cfg.engine) == known
        made_by = rules_of(cfg).made_by
        assert {key: made_by.get(key) for key in known} == known
        assert {*made_by} & {*options} == {*known}
    cfg.engine = EngineConfig(name="sglang", args={"mem-fraction-static": 0.8})
    assert answering(cfg.engine) == {}


@pytest.fixture
def stub(cfg: Config) -> Config:
    """A configuration whose server starts at once and does as it is told."""
    command = ["python", "-c", STUB, "{model}", "{port}"]
    cfg.engine = EngineConfig(name="sglang", command=command, port=free_port(2))
    return cfg


def asking(text: str, server: int = 0) -> Request:
    return Request([{"role": "user", "content": text}], Sampling(), server=server)


def using(cfg: Config, use: Callable[[ServerEngine], Coroutine[Any, Any, Any]]) -> Any:
    """What `use` returns of an engine that is closed afterwards."""

    async def main() -> Any:
        engine = ServerEngine(cfg)
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def alive(pids: list[int]) -> list[int]:
    """Those that run; one that has ended may stay until somebody waits for it."""
    found = []
    for pid in pids:
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += [pid] if state != "Z" else []
    return found


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 120
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pids)


def pids_in(log: Path) -> list[int]:
    """Server, and its child in another session, as the stub has printed them."""
    found = [line.split()[1:] for line in log.read_text().splitlines() if line.startswith("pids")]
    return [int(pid) for pids in found for pid in pids]


@pytest.mark.parametrize(
    ("config", "billions", "gpus"), [(QWEN3_8B, 8.2, 1), (QWEN3_32B, 32.8, 2), (LLAMA_70B, 70.6, 8)]
)
def test_gpus_by_size(config: dict[str, Any], billions: float, gpus: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 128}))
    count = parameters(str(tmp_path))
    assert count / 1e9 == pytest.approx(billions, abs=0.05)
    assert tp_size_of(Config(model=ModelConfig(name="m", path=str(tmp_path)))) == gpus


def test_a_405b_takes_a_whole_machine() -> None:
    assert tp_size_of(Config(model=ModelConfig(name="m", path="m", billions=405))) == 8


def test_a_model_that_says_nothing_of_its_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"set engine\.tp_size"):
        parameters(str(tmp_path))


@pytest.mark.parametrize(
    ("tp_size", "wanted", "gpus", "expected"),
    [
        (2, None, 8, 4),
        (2, 3, 8, 3),
        (2, 5, 8, r"tp_size=2 x engine\.num_servers=5 .* at most engine\.num_servers=4"),
        (4, 1, 2, r"engine\.tp_size=4, but this machine has 2 GPUs"),
        (1, None, 0, r"has 0 GPUs; engine=modal"),
    ],
)
def test_servers_on_a_machine(tp_size: int, wanted: Any, gpus: int, expected: int | str) -> None:
    options = EngineConfig(name="sglang", num_servers=wanted)
    if isinstance(expected, int):
        assert count_servers(options, tp_size, gpus) == expected
    else:
        with pytest.raises(InputError, match=expected):
            count_servers(options, tp_size, gpus)


def test_every_server_has_its_own_gpus(stub: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    stub.engine.tp_size = 2

    async def ask_both(engine: ServerEngine) -> list[str]:
        assert engine.servers == 2
        answers = await asyncio.gather(*(engine.answer(asking("?", n)) for n in range(2)))
        return [answer.message["content"] for answer in answers]

    assert using(stub, ask_both) == ["4,5", "6,7"]


ARGS = {"mem_fraction_static": 0.85, "enable_metrics": True, "skip_server_warmup": False,
        "json_model_override_args": {"a": 1}}  # fmt: skip


def test_the_command_line() -> None:
    command = server_command(EngineConfig(name="sglang", args=ARGS), "Qwen/Qwen3-8B", 2, 30001)
    assert command[1:] == [
        "-m", "sglang.launch_server", "--model-path", "Qwen/Qwen3-8B", "--tp-size", "2", "--host",
        "127.0.0.1", "--port", "30001", "--mem-fraction-static", "0.85", "--enable-metrics",
        "--json-model-override-args", '{"a": 1}',
    ]  # fmt: skip


def test_without_sglang_the_way_out_is_named(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg.engine = EngineConfig(name="sglang")
    with pytest.raises(InputError, match=r"pip install sglang.*engine\.command"):
        ServerEngine(cfg)


def test_answers_of_another_server(stub: Config) -> None:
    """They are neither finished nor reused with those of a server that answers otherwise."""
    write_prompts(stub, ["one", "two"])
    folder = regen(stub)
    stub.engine.args = {"quantization": "fp8"}
    changed = r"engine\.args was None, now \{'quantization': 'fp8'\}.*regen\.force=true"
    with pytest.raises(InputError, match=changed):
        regen(stub)
    partial = folder.rename(f"{folder}.partial")
    (partial / "shards").mkdir()
    (partial / "shards" / "train-000000-0.jsonl.open").touch()
    (partial / "run.json").rename(partial / "begun.json")
    with pytest.raises(InputError, match=changed):
        regen(stub)
    stub.engine.args = {"mem_fraction_static": 0.5}
    assert regen(stub).exists()


def test_nothing_is_left_at_the_end(stub: Config) -> None:
    async def ask(engine: ServerEngine) -> list[int]:
        await engine.answer(asking("?"))
        pids = pids_in(engine.processes[0].log)
        assert len(alive(pids)) == 2
        return pids

    assert gone(using(stub, ask))


def test_nothing_is_left_when_the_client_is_killed(stub: Config, tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from specforge_exp.serving.server import Server\n"
        "async def main():\n"
        "    await Server(sys.argv[3:], int(sys.argv[1]), Path(sys.argv[2]), {}).start(300)\n"
        "    print('healthy', flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    port, log = stub.engine.port, tmp_path / "server.log"
    command = server_command(stub.engine, "m", 1, port)
    client = subprocess.Popen(
        [sys.executable, str(script), str(port), str(log), *command],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert client.stdout is not None
    assert client.stdout.readline() == "healthy\n"
    pids = pids_in(log)
    assert len(alive(pids)) == 2
    client.send_signal(signal.SIGKILL)
    client.communicate()
    assert gone(pids)


def test_a_server_that_dies_is_started_again(stub: Config) -> None:
    async def die_once(engine: ServerEngine) -> None:
        await engine.answer(asking("?"))
        first = pids_in(engine.processes[0].log)
        asked = [engine.answer(asking(text)) for text in ("wait", "die", "wait")]
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(end) for end in ends] == [ServerDied] * 3
        assert gone(first)
        answers = await asyncio.gather(*(engine.answer(asking("?")) for _ in range(5)))
        assert len(answers) == 5
        assert len(pids_in(engine.processes[0].log)) == 2 * len(first)

    using(stub, die_once)


def test_a_server_that_does_not_start(stub: Config) -> None:
    stub.engine.command = ["python", "-c", "print('no room for the model'); raise SystemExit(4)"]

    async def ask_thrice(engine: ServerEngine) -> list[Any]:
        asked = [engine.answer(asking("?")) for _ in range(3)]
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert engine.processes[0].log.read_text().count("no room") == 1
        return ends

    for end in using(stub, ask_thrice):
        assert isinstance(end, InputError)
        assert "exit code 4" in str(end) and "no room for the model" in str(end)


def test_a_server_that_never_gets_healthy(stub: Config) -> None:
    stub.engine.command = ["python", "-c", "import time; time.sleep(1000)"]
    stub.engine.startup_timeout = 0.5
    with pytest.raises(InputError, match=r"engine\.startup_timeout=0\.5"):
        using(stub, lambda engine: engine.answer(asking("?")))


def test_a_port_that_is_taken(stub: Config) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", stub.engine.port))
        other.listen()
        with pytest.raises(InputError, match=rf"port {stub.engine.port} is taken.*engine\.port"):
            using(stub, lambda engine: engine.answer(asking("?")))


def test_layouts(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert layout(cfg).startswith("engine transformers in this process, 64")
    cfg.engine = EngineConfig(name="openai", urls=["http://a/v1", "http://b/v1"])
    assert "http://a/v1, http://b/v1, 64 conversations at a time each" in layout(cfg)
    cfg.engine = EngineConfig(name="sglang", tp_size=2, num_servers=3, usd_per_gpu_hour=2.0)
    assert "3 servers on ports 30000..30002, tp_size 2, 6 of 8 GPUs" in layout(cfg)
    assert layout(cfg).endswith("$12.00 per hour")
    cfg.engine = EngineConfig(name="modal", num_servers=5, usd_per_gpu_hour=3.95)
    assert "at most 5 containers of H100:1, 64 conversations at a time each" in layout(cfg)
    assert layout(cfg).endswith("$3.95 per container and hour")
    cfg.engine.num_servers = None
    assert "as many as Modal gives" in layout(cfg)


@pytest.mark.slow
def test_a_poisoned_conversation_fails_alone(cfg: Config) -> None:
    """The tiny target behind real HTTP on two servers, one of which dies of a conversation."""
    cfg.regen.temperature, cfg.regen.max_tokens, cfg.regen.chunk_size = 0.0, 6, 8
    cfg.engine = EngineConfig(
        name="sglang", command=[warm.python("-c"), *COMMAND[1:]], port=free_port(2), num_servers=2,
        concurrency=4,
    )  # fmt: skip
    texts = [f"Describe kettle {number}." for number in range(25)]
    texts[11] += " " + POISON
    texts[20] += " " + REFUSED
    write_prompts(cfg, texts)
    prompts = Path(cfg.paths.datasets) / "small"
    assert "2 servers" in describe(cfg, [prompts / "train.jsonl"])
    folder = regen(cfg)
    done = [json.loads(line)["id"] for line in (folder / "train.jsonl").read_text().splitlines()]
    assert done == [f"c{number}" for number in range(24) if number not in (11, 20)]
    lines = [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]
    failed = {record["id"]: record["error"] for record in lines}
    assert failed == {"c11": "the server dies of it", "c20": "HTTP 400: not this one"}
