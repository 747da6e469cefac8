"""The server as clients, routers and operators see it: a real process, real connections."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
import warm
from conftest import REPOSITORY, TINY

from specforge_exp.data.chat import prompt_ids
from specforge_exp.target import Target

DEADLINE = 300
ASK = [{"role": "user", "content": "How many apples has Otto?"}]
TOKENS = 200
LONG = {"messages": ASK, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}


@contextmanager
def serving(*options: str, hold: Path | None = None) -> Iterator[tuple[str, warm.Started]]:
    """A server; its answers get no longer while `hold` is there."""
    command = ["-m", "specforge_exp.generation.local.serve"]
    if hold:
        command = [str(REPOSITORY / "tests" / "held_server.py"), str(hold)]
    words = [*command, "--model", TINY.path, "--port", "0", *options]
    process = warm.start(words, kind="stages")
    try:
        while not (found := re.search(r"listening on (http://[\d.]+:\d+)\n", process.printed())):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        yield found[1], process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file is there, the answers of `url` get no longer."""
    return tmp_path_factory.mktemp("held") / "answers"


@pytest.fixture(scope="module")
def url(hold: Path) -> Iterator[str]:
    options = ("--concurrency", "2", "--max-queue", "1", "--context-length", "2000")
    with serving(*options, hold=hold) as (url, _):
        yield url


def fetch(address: str, body: Any = None, seconds: float = DEADLINE) -> tuple[int, Any, Any]:
    """Status, headers and JSON of a GET, or of a POST with a body."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(address, data, seconds) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def complete(url: str, body: Any) -> tuple[int, Any, Any]:
    return fetch(f"{url}/v1/chat/completions", body)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def running(url: str) -> int:
    count: int = fetch(f"{url}/metrics")[2]["running"]
    return count


def test_an_answer_is_the_models(url: str, tiny_target: Target, tiny_tokenizer: Any) -> None:
    # The last three are what routers add.
    extra = {"separate_reasoning": True, "no_stop_trim": False, "return_hidden_states": False}
    status, _, body = complete(
        url, {"model": "any", "messages": ASK, "temperature": 0, "max_tokens": 20, **extra}
    )
    ids = prompt_ids(tiny_tokenizer, ASK, {})
    said = tiny_target.model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=20, eos_token_id=2
    )[0, len(ids) :].tolist()
    assert status == 200
    assert (body["object"], body["model"]) == ("chat.completion", TINY.path)
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": tiny_tokenizer.decode(said, skip_special_tokens=True),
    }
    assert choice["finish_reason"] == ("stop" if said[-1] == 2 else "length")
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), len(said))
    assert usage["total_tokens"] == len(ids) + len(said)
    again = complete(url, {"messages": ASK, "temperature": 0, "max_tokens": 20})[2]
    assert again["choices"] == body["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(ids) // 16 * 16


def test_the_seed_decides(url: str) -> None:
    body = {"messages": ASK, "temperature": 1.5, "max_tokens": 30, "top_k": 50}
    said = [
        complete(url, body | {"seed": seed})[2]["choices"][0]["message"]["content"]
        for seed in (1, 2, 1)
    ]
    assert said[0] == said[2] != said[1]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"), (b"\xff", "not JSON"), ([], "must be an object"),
        ({}, "messages must be a list"), ({"messages": []}, "at least one"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "user"}]}, "chat template"),
        ({"messages": ASK, "temperature": -1}, "temperature=-1 must be a number from 0"),
        ({"messages": ASK, "temperature": "hot"}, "temperature='hot'"),
        ({"messages": ASK, "top_p": 0}, "top_p=0"), ({"messages": ASK, "top_k": 1.5}, "top_k=1.5"),
        ({"messages": ASK, "max_tokens": 0}, "max_tokens=0"), ({"messages": ASK, "n": 2}, "n=2"),
        ({"messages": ASK, "seed": True}, "seed=True"),
        ({"messages": ASK, "tools": {}}, "tools must be a list"),
        ({"messages": ASK, "chat_template_kwargs": []}, "must be an object"),
        ({"messages": ASK, "stream": True}, "stream=true is not supported"),
        ({"messages": ASK, "stop": ["."]}, r"stop=\['\.'\] is not supported"),
        ({"messages": ASK, "presence_penalty": 0.5, "logit_bias": {}}, "presence_penalty=0.5"),
        ({"messages": [{"role": "user", "content": "apple " * 4000}]}, "the context of 2000"),
    ],
)  # fmt: skip
def test_bad_requests(url: str, body: Any, words: str) -> None:
    status, _, answer = complete(url, body)
    assert status == 400
    assert re.search(words, answer["error"]["message"])
    assert answer["error"]["type"] == "invalid_request_error"


def test_what_routers_ask_for(url: str) -> None:
    assert fetch(f"{url}/health")[0] == 200
    assert fetch(f"{url}/v1/models")[2]["data"][0]["id"] == TINY.path
    for path in ("get_server_info", "get_model_info"):
        assert fetch(f"{url}/{path}")[2]["model_path"] == TINY.path


def test_more_than_may_wait_are_sent_away_and_a_lost_client_frees_its_slot(
    url: str, hold: Path
) -> None:
    async def scene() -> None:
        async with aiohttp.ClientSession() as http:

            async def ask() -> int:
                async with http.post(f"{url}/v1/chat/completions", json=LONG) as answer:
                    await answer.read()
                    return answer.status

            tasks = [asyncio.create_task(ask()) for _ in range(3)]
            state = {"running": 0, "waiting": 0}
            while (state["running"], state["waiting"]) != (2, 1):
                async with http.get(f"{url}/metrics") as answer:
                    state = await answer.json()
            status, headers, body = await asyncio.to_thread(complete, url, LONG)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert body["error"]["type"] == "server_error"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    before = fetch(f"{url}/metrics")[2]["generated_tokens"]
    hold.touch()
    asyncio.run(asyncio.wait_for(scene(), DEADLINE))
    wait_for(lambda: running(url) == 0)
    hold.unlink()
    state = fetch(f"{url}/metrics")[2]
    assert state["waiting"] == 0
    assert state["generated_tokens"] - before < 2 * TOKENS
    assert complete(url, {"messages": ASK, "max_tokens": 2})[0] == 200


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_accepts_no_more(tmp_path: Path) -> None:
    hold = tmp_path / "answers"
    hold.touch()

    async def scene() -> None:
        with serving("--concurrency", "1", hold=hold) as (url, process):
            async with aiohttp.ClientSession() as http:
                address = f"{url}/v1/chat/completions"
                task = asyncio.create_task(http.post(address, json=LONG))
                await asyncio.to_thread(wait_for, lambda: running(url) == 1)
                # This leaves a connection that is kept open.
                async with http.get(f"{url}/health") as answer:
                    assert answer.status == 200
                process.send_signal(signal.SIGTERM)

                def closed() -> bool:
                    try:
                        return fetch(f"{url}/health", seconds=2.0)[0] != 200
                    except OSError:  # refused, or left in the queue of a socket that closes
                        return True

                await asyncio.to_thread(wait_for, closed)
                assert process.poll() is None
                with pytest.raises(aiohttp.ClientError):
                    async with http.post(address, json=LONG) as late:
                        late.raise_for_status()
                hold.unlink()
                body = await (await task).json()
                assert body["usage"]["completion_tokens"] == TOKENS
                assert await asyncio.to_thread(process.wait, DEADLINE) == 0

    asyncio.run(asyncio.wait_for(scene(), 2 * DEADLINE))


def test_a_wrong_command_line_ends_in_one_line() -> None:
    command = ["-m", "specforge_exp.generation.local.serve", "--model", "no/where"]
    done = warm.run(command, kind="stages")
    assert done.returncode == 1
    assert "model.path=no/where is not in the cache" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, specforge_exp.generation.local.serve\n"
        "print({'torch', 'transformers', 'aiohttp', 'omegaconf'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
