"""bench against servers that speculate for real: the same figures as in this process."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import warm
from conftest import REPOSITORY, make_config
from hypothesis import given
from hypothesis import strategies as st
from test_server_engine import free_port, gone

from specforge_exp import paths
from specforge_exp.bench.acceptance import PairedAnswer, summarise
from specforge_exp.bench.clients import AnswerStream, accepted_of
from specforge_exp.bench.served import Exchange, check_speculated, server_of, serving
from specforge_exp.config import BenchConfig, Config, EngineConfig, Source
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.errors import InputError
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.prep import prep
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.train import train

PLACES = ["--model", "{model}", "--draft", "{draft}", "--port", "{port}"]
EXACT = (
    "prompts responses accepted_length accepted_length_pooled lengths gained gained_at_least "
    "acceptance_by_position tokens target_forwards_saved lossless identical novel"
).split()


SERVER = str(REPOSITORY / "tests" / "speculating_server.py")


def server() -> list[str]:
    """How a server begins that speculates."""
    return [warm.python(Path(SERVER).name), SERVER]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An exported draft whose chains are right now and then."""
    cfg = make_config(tmp_path_factory.mktemp("trained"))
    cfg.data.train[0].limit = 40
    cfg.preprocess.source = "prep"
    cfg.epochs, cfg.lr, cfg.trainer.batch_size = 3, 8e-3, 2
    cfg.target.cache, cfg.export.dtype = "memory", "float32"
    cfg.bench.max_tokens, cfg.bench.bootstrap, cfg.bench.turns = 24, 50, "all"
    talks = Path(cfg.paths.datasets, "talks.jsonl")
    talks.parent.mkdir(parents=True)
    asks = [{"role": "user", "content": "Go on."}]
    with talks.open("w") as file:
        for number, name in enumerate(("Anna", "Ben", "Clara")):
            first = {"role": "user", "content": f"Tell me a story about {name}."}
            said = {"role": "assistant", "content": "x"}
            record = {"id": str(number), "conversations": [first, said, *asks]}
            file.write(json.dumps(record) + "\n")
    cfg.bench.datasets = {
        "stories": Source(path="synthetic:bench/stories", limit=3),
        "talks": Source(path=str(talks)),
    }
    for stage in (prep, preprocess, train, export):
        stage(cfg)
    return cfg


@pytest.fixture
def exported(trained: Config, tmp_path: Path) -> Config:
    """Its own copy for a test."""
    cfg = deepcopy(trained)
    cfg.paths.checkpoints = str(tmp_path)
    shutil.copytree(paths.export_dir(trained), paths.export_dir(cfg))
    return cfg


def served(cfg: Config, *more: str, name: str = "sglang", **bench_options: Any) -> Config:
    """With a server that bench starts."""
    command = [*server(), *PLACES, "--speaks", name, *more]
    engine = EngineConfig(name=name, command=command, port=free_port())
    return replace(cfg, engine=engine, bench=replace(cfg.bench, **bench_options))


@pytest.fixture
def running(exported: Config) -> Iterator[Callable[..., str]]:
    """Starts a server and returns its address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(draft: str, *more: str) -> str:
        port = free_port()
        command = [*server(), "--model", exported.model.path, "--draft", draft, "--port", str(port)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        started.append(subprocess.Popen([*command, *more], env=environment))
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while time.monotonic() < end:
            try:
                with urlopen(f"{url}/health", timeout=5):
                    return url
            except (URLError, OSError):
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    yield start
    for process in started:
        process.kill()
        process.wait()


def figures(cfg: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(paths.bench_file(cfg).read_text())["datasets"]
    return found


@pytest.mark.slow
def test_a_server_gives_the_figures_of_this_process(
    exported: Config, running: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang's interface with a server that bench starts, vLLM's with one that runs."""
    bench(exported)
    expected = figures(exported)
    assert expected["talks"]["prompts"] == 3 and expected["talks"]["responses"] == 6
    assert expected["stories"]["accepted_length"] > 1.2
    cfg = served(exported)
    bench(cfg)
    assert paths.bench_file(cfg).name == "bench-sglang.json"
    found = figures(cfg)
    draft = str(paths.export_dir(exported))
    engine = EngineConfig(name="openai", urls=[running(draft, "--speaks", "vllm") + "/v1"])
    alone = running("", "--speaks", "vllm")
    asked = replace(exported, engine=engine, bench=replace(exported.bench, alone_url=alone))
    bench(asked)
    for name, whole in expected.items():
        for key in EXACT:
            assert found[name][key] == pytest.approx(whole[key]), (name, key)
            assert figures(asked)[name][key] == pytest.approx(whole[key]), (name, key)
        for each in (found[name], figures(asked)[name]):
            assert each["speedup"] > 0 and each["speedup_decode"] > 0
            assert each["first_token_seconds"] > 0
    said = capsys.readouterr().out
    assert "engine=sglang, 1 at a time" in said and "engine=openai" in said
    together = replace(asked, bench=replace(asked.bench, force=True, concurrency=2))
    with pytest.raises(InputError, match=r"per-request-spec-decode-metrics.*concurrency=1"):
        bench(together)
    engine.urls = [alone]
    refused = replace(asked, bench=replace(asked.bench, force=True))
    with pytest.raises(InputError, match=r"never speculated.*started with the draft"):
        bench(refused)


@pytest.mark.slow
def test_several_at_a_time_change_no_count(exported: Config) -> None:
    """SGLang's histogram, and each step of vLLM's, that come with every answer."""
    sglang = served(exported, concurrency=3, alone=False)
    vllm = served(exported, "--tells", "detailed", name="vllm", concurrency=3, alone=False)
    for asked in (sglang, vllm, exported):
        bench(asked)
    for name, whole in figures(exported).items():
        for told in (figures(sglang)[name], figures(vllm)[name]):
            assert told["lengths"] == pytest.approx(whole["lengths"])
            assert told["speedup"] is None and told["lossless"] is None
        assert figures(vllm)[name]["gained"] == whole["gained"]


@pytest.mark.slow
def test_a_server_that_never_speculates_is_no_measurement(exported: Config) -> None:
    cfg = served(exported)
    cfg.engine.command[cfg.engine.command.index("{draft}")] = ""
    with pytest.raises(InputError, match=r"the server never speculated.*started with the draft"):
        bench(cfg)
    assert not paths.bench_file(cfg).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "words"), [("at-once", "no such kernel"), ("later", "out of memory, says")]
)
def test_a_server_that_fails_leaves_nothing_behind(
    exported: Config, fails: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R34: the error has the end of the log; nothing of the process group lives on."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InputError, match=words):
        cfg = served(exported, "--fails", fails)
        cfg.engine.command[0] = sys.executable  # its group is bench's alone to end
        bench(cfg)
    (log,) = tmp_path.glob("specforge-bench-*/server-0.log")
    pids = [int(p) for line in log.read_text().splitlines() if line.startswith("pids")
            for p in line.split()[1:]]  # fmt: skip
    assert len(pids) == 2 and gone(pids)


def test_a_port_that_is_taken(exported: Config) -> None:
    cfg = served(exported)
    taken = rf"port {cfg.engine.port} is taken.*engine\.port"
    with (
        socket.create_server(("127.0.0.1", cfg.engine.port)),
        pytest.raises(InputError, match=taken),
    ):
        bench(cfg)


def test_the_command_line_of_sglang(cfg: Config, tmp_path: Path) -> None:
    """What the drafts ask for, where it is not the user's own engine.args."""
    python = "/opt/sglang/bin/python"
    cfg.engine = EngineConfig(
        name="sglang", python=python, tp_size=1, args={"speculative_num_steps": 3}
    )
    cfg.model.path = str(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specforge_exp.serving.gpus.visible_gpus", lambda: ["4", "5"])
        eagle3 = server_of(cfg, False, tmp_path)
        alone = server_of(cfg, True, tmp_path)
        cfg.draft = DFlashConfig(name="dflash")
        dflash = server_of(cfg, False, tmp_path)
    assert eagle3.environment == {"CUDA_VISIBLE_DEVICES": "4"}
    folder = str(paths.export_dir(cfg).resolve())
    start = [python, "-m", "sglang.launch_server", "--model-path", str(tmp_path), "--tp-size", "1"]
    start += ["--host", "127.0.0.1", "--port", "30000"]
    where = ["--speculative-draft-model-path", folder]
    assert eagle3.command == [
        *start, "--speculative-algorithm", "EAGLE3", "--speculative-num-steps", "3",
        "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "6", *where,
    ]  # fmt: skip
    assert dflash.command == [
        *start, "--speculative-algorithm", "DFLASH", "--speculative-num-draft-tokens", "16",
        *where, "--speculative-num-steps", "3",
    ]  # fmt: skip
    assert alone.command == [*start, "--speculative-num-steps", "3"]


def test_the_command_line_of_vllm(cfg: Config, tmp_path: Path) -> None:
    """Its own words for the same; parts of a mapping are the user's, and no flag is lost."""
    python = "/opt/vllm/bin/python"
    args = {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": None}
    args |= {"speculative_config": {"draft_tensor_parallel_size": 1}}
    cfg.engine = EngineConfig(name="vllm", python=python, tp_size=1, num_servers=1, args=args)
    cfg.model.path = str(tmp_path)
    for draft, method, length in ((cfg.draft, "eagle3", 5), (DFlashConfig(), "dflash", 15)):
        cfg.draft = draft
        command = server_of(cfg, False, tmp_path).command
        start = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
        where = ["--tensor-parallel-size", "1", "--host", "127.0.0.1", "--port", "30000"]
        assert command[:11] == [*start, *where]
        assert command[11] == "--speculative-config"
        assert json.loads(command[12]) == {
            "method": method, "num_speculative_tokens": length, "draft_tensor_parallel_size": 1,
            "model": str(paths.export_dir(cfg).resolve()),
        }  # fmt: skip
        told = ["--per-request-spec-decode-metrics", "detailed"]
        assert command[13:] == [*told, "--enforce-eager", "--no-enable-prefix-caching"]
    alone = server_of(cfg, True, tmp_path).command
    assert "--per-request-spec-decode-metrics" not in alone


@pytest.mark.parametrize(
    ("sources", "told"), [("per_request_spec_decode_metrics", True), ("", False)]
)
def test_an_older_vllm_is_not_asked_for_what_it_does_not_know(
    cfg: Config, tmp_path: Path, sources: str, told: bool
) -> None:
    """It would not start."""
    file = tmp_path / "lib" / "python3.12" / "site-packages" / "vllm" / "engine" / "arg_utils.py"
    file.parent.mkdir(parents=True)
    file.write_text(sources)
    python = str(tmp_path / "bin" / "python")
    cfg.engine = EngineConfig(name="vllm", python=python, tp_size=1, num_servers=1)
    cfg.model.path = str(tmp_path)
    command = server_of(cfg, False, tmp_path).command
    assert ("--per-request-spec-decode-metrics" in command) == told


def test_pieces_of_an_answer() -> None:
    """Whole answers so far or new tokens; several steps at once; a first piece of two steps."""
    whole = AnswerStream()
    for tokens in ([7], [7, 8, 9], [7, 8, 9], [7, 8, 9, 1, 2, 3]):
        whole.add(tokens, whole=True)
    found = whole.end(2, None)
    assert found.generation.tokens == [7, 8, 9, 1, 2, 3]
    assert found.generation.gained == [2, 3] and found.generation.accepted == []
    merged = AnswerStream()
    for tokens in ([7, 8, 9], [1, 2, 3]):
        merged.add(tokens, whole=False)
    assert merged.end(2, [1, 2]).generation.gained == [2, 3]
    once = AnswerStream()
    once.add([7, 8, 9, 1, 2, 3], whole=False)
    assert once.end(2, [1, 2]).generation.gained == [2, 3]
    assert once.end(2, None).generation.gained == []
    single = once.end(0, None).generation
    assert single.gained == []


def streamed(*pieces: int) -> AnswerStream:
    """An answer that came in pieces of so many tokens."""
    stream = AnswerStream()
    for size in pieces:
        stream.add([7] * size, whole=False)
    return stream


@given(st.data())
def test_what_was_gained_is_right_or_not_said(data: st.DataObject) -> None:
    """However a stream joins its pieces: what is said of each verification is what it added, and
    it is said wherever their order is known, nothing was cut, or each came in its own piece."""
    yielded = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    over = data.draw(st.integers(0, yielded[-1] - 1))
    gained = [*yielded[:-1], yielded[-1] - over]
    joined = [data.draw(st.booleans()) for _ in gained]
    pieces = [1]
    for size, join in zip(gained, joined, strict=True):
        if join:
            pieces[-1] += size
        else:
            pieces.append(size)
    stream = streamed(*pieces)
    accepted = [number - 1 for number in yielded]
    counted = stream.end(len(yielded), sorted(accepted)).generation
    assert counted.accepted == sorted(accepted)
    assert sorted(counted.gained) in (sorted(gained), [])
    if not over or not any(joined[1:]) or len(set(yielded)) == 1:
        assert sorted(counted.gained) == sorted(gained)
    assert stream.end(len(yielded), None).generation.gained in (gained, [])
    ordered = stream.end(len(yielded), accepted, in_order=True)
    assert ordered.generation.gained == gained and ordered.generation.accepted == accepted


def test_which_verification_was_cut_is_not_guessed() -> None:
    """Verifications of 2 and 4 and 3 tokens, the last cut by one, the last two in one piece: of
    counts without their order the histogram would be another with each that could be the last."""
    stream = streamed(1, 2, 6)
    assert stream.end(3, [1, 2, 3]).generation.gained == []
    assert stream.end(3, [1, 3, 2], in_order=True).generation.gained == [2, 4, 2]
    assert streamed(1, 2, 4, 2).end(3, [1, 2, 3]).generation.gained == [2, 4, 2]
    assert streamed(1, 9).end(3, [3, 3, 3]).generation.gained == [4, 4, 1]
    assert streamed(1, 5).end(2, [0, 5]).generation.gained == [1, 4]


def test_counts_that_do_not_fit_say_nothing() -> None:
    """A server that counts other requests' verifications, or fewer than there were."""
    assert streamed(2).end(3, [2, 2, 2]).generation.gained == []
    assert streamed(2, 3).end(1, [2]).generation.gained == []
    assert streamed(2, 3).end(2, [5, 0], in_order=True).generation.gained == []


def test_what_a_server_does_not_say_is_not_counted_as_nothing(cfg: Config) -> None:
    """It counted three verifications and sent their tokens in two pieces: nobody knows how many
    drafted tokens each kept, so there is no rate by position, and no mean that is made of it."""
    stream = AnswerStream()
    for piece in ([1], [2, 3, 4, 5, 6, 7], [8, 9, 10]):
        stream.add(piece, whole=False)
    answer = stream.end(3, None)
    found = summarise([PairedAnswer(answer.generation, None, 0.0, False, 3)], 5, 10, True)
    assert found["accepted_length"] == 3.0 and found["acceptance_by_position"] == []
    assert found["gained"] == [] and found["gained_at_least"] == {"3": None, "5": None}
    check_speculated(cfg, "own", [[Exchange([0], answer)]])
    cfg.bench.average = "responses"
    with pytest.raises(InputError, match=r"average=responses needs .* of 1 of 1 answers"):
        check_speculated(cfg, "own", [[Exchange([0], answer)]])


def test_a_server_that_drafts_more_than_is_counted_is_refused(cfg: Config) -> None:
    """Six of seven drafted tokens stood: a histogram up to five would lose that verification."""
    for accepted in ([2, 6], None):
        exchanges = [[Exchange([0], streamed(1, 3, 7).end(2, accepted))]]
        with pytest.raises(InputError, match=r"kept 6 drafted .* bench\.chain_length=5"):
            check_speculated(cfg, "own", exchanges)
        check_speculated(replace(cfg, bench=BenchConfig(chain_length=6)), "own", exchanges)


def test_one_server_is_measured(cfg: Config) -> None:
    """Of several the first alone would be."""
    cfg.engine = EngineConfig(
        name="openai", urls=["http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1"]
    )

    async def entered() -> None:
        async with serving(cfg, alone=False):
            pass

    with pytest.raises(InputError, match=r"one server, engine\.urls has 2"):
        asyncio.run(entered())


def test_counts_by_position() -> None:
    prefix = "accepted_tokens_per_pos/"
    grown = {"drafts": 5.0, f"{prefix}0": 3.0, f"{prefix}1": 3.0, f"{prefix}2": 1.0}
    assert accepted_of(grown) == [0, 0, 2, 2, 3]
    assert accepted_of({"drafts": 5.0}) is None
