"""A real vLLM server on this machine's CPU with an EAGLE-3 draft: `make engines` sets it up.

Nothing here is of our making but the draft: the server loads the export as it is, and its answers
and its own counts have to be those of bench in this process.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from mending import SPREAD
from scipy.stats import chi2_contingency
from test_bench_served import figures, trained  # noqa: F401
from vllm_servers import (
    Serve,
    Served,
    measured,
    regenerated,
    reproduced,
    same,
    speculating,
)

from specforge_exp.bench import clients
from specforge_exp.bench.asking import asking_of
from specforge_exp.bench.sets import bench_sets
from specforge_exp.bench.speculative import Decoding
from specforge_exp.config import Config, EngineConfig
from specforge_exp.data.conversations import asks_of
from specforge_exp.serving.server import connections
from specforge_exp.stages.bench import bench
from specforge_exp.target import load_tokenizer

pytestmark = pytest.mark.engines
pytest_plugins = ("vllm_servers",)


@pytest.fixture(scope="module")
def eagle3(trained: Config, serve: Serve) -> Served:  # noqa: F811
    return speculating(serve, "eagle3", trained)


def test_eagle3_on_vllm(
    trained: Config,  # noqa: F811
    eagle3: Served,
    alone: Served,
) -> None:
    """Loaded unedited, lossless, and tau and every count of each prompt as in this process; without
    TELLING, the histogram of what was gained may be unknown."""
    bench(trained)
    expected = figures(trained)
    assert expected["stories"]["accepted_length"] > 1.2
    same(measured(trained, eagle3, alone), expected, unsaid=True)
    said = eagle3.log.read_text()
    assert "LlamaForCausalLMEagle3" in said
    assert "auxiliary layers from speculative config: (2, 4, 5)" in said


@pytest.fixture(scope="module")
def ours(trained: Config, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:  # noqa: F811
    """The conversations of engine=transformers."""
    folder = tmp_path_factory.mktemp("ours")
    return regenerated(trained, folder, EngineConfig(name="transformers"))


def test_regen_on_vllm(
    trained: Config,  # noqa: F811
    eagle3: Served,
    alone: Served,
    ours: list[Any],
    tmp_path: Path,
) -> None:
    """Two servers, several conversations at a time: the answers of engine=transformers."""
    urls = [f"{eagle3.url}/v1", f"{alone.url}/v1"]
    engine = EngineConfig(name="openai", urls=urls, served_name="tiny", concurrency=4)
    assert regenerated(trained, tmp_path, engine) == ours
    assert len(ours) == 24


SAMPLES = 400


def test_sampled_answers_are_the_targets_own(
    trained: Config,  # noqa: F811
    eagle3: Served,
    alone: Served,
    serve: Serve,
    mended: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At temperature 1, with the draft, tokens are distributed as those of the target alone, eight
    requests at a time; where vLLM on a CPU loses the temperature of drafted tokens, this is so once
    that is mended."""
    if reproduced(SPREAD) == "differs":
        assert reproduced(SPREAD, **mended) == "right"
        eagle3 = speculating(serve, "eagle3", trained, **mended)
    asking = asking_of(trained, load_tokenizer(trained.model), None)
    prompt = asking.encode(asks_of(bench_sets(trained).records["stories"][0])[0])
    decoding = Decoding(3, trained.chain_length, 1.0, frozenset())
    asking = replace(asking, decoding=decoding)

    async def uncounted(*_: Any) -> dict[str, float]:  # /metrics would be of all eight together
        return {}

    monkeypatch.setattr(clients, "counters", uncounted)

    async def answers(url: str) -> Counter[tuple[int, ...]]:
        async with connections(60.0, None) as http:
            client = clients.openai(http, url, "tiny", several=False)
            drawn: list[clients.ServedAnswer] = []
            while len(drawn) < SAMPLES:
                places = range(len(drawn), len(drawn) + 8)
                eight = (client(prompt, asking.sampled(f"{url} {place}")) for place in places)
                drawn += await asyncio.gather(*eight)
        return Counter(tuple(answer.generation.tokens) for answer in drawn)

    counts = [asyncio.run(answers(served.url)) for served in (eagle3, alone)]
    often = [tokens for tokens, count in (counts[0] + counts[1]).items() if count >= 16]
    rows = [[count[tokens] for tokens in often] for count in counts]
    columns = [*zip(*rows, strict=True), tuple(SAMPLES - sum(row) for row in rows)]
    assert len(often) > 2
    assert chi2_contingency([column for column in columns if sum(column)]).pvalue > 1e-3


ANSWERED = "/v1/chat/completions"


def killed_after_an_answer(served: Served, before: int, told: list[int]) -> None:
    """Kill a server as soon as it has answered once more."""
    while served.log.read_text().count(ANSWERED) <= before and served.process.poll() is None:
        time.sleep(0.05)
    os.killpg(served.process.pid, signal.SIGKILL)
    told.append(served.process.wait())


def test_one_of_two_servers_is_killed(
    trained: Config,  # noqa: F811
    eagle3: Served,
    alone: Served,
    ours: list[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """regen says so once and the other does its work: the conversations of an undisturbed one. It
    is the last test here, as it takes the others' server."""
    engine = EngineConfig(
        name="openai", urls=[f"{eagle3.url}/v1", f"{alone.url}/v1"], served_name="tiny",
        concurrency=1, patience=2.0,
    )  # fmt: skip
    told: list[int] = []
    before = eagle3.log.read_text().count(ANSWERED)
    killer = Thread(target=killed_after_an_answer, args=(eagle3, before, told))
    killer.start()
    assert regenerated(trained, tmp_path, engine) == ours
    killer.join()
    assert told == [-signal.SIGKILL]
    assert caplog.text.count(f"the other servers do the work of {eagle3.url}") == 1
