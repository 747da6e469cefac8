"""Many conversations at a time: servers stay busy, beginnings stay together, ends are clean."""

import asyncio
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from instant_engine import Instant, answer_all, make_store, merged, plain, rules, said
from test_plan import write

from specforge_exp.data.messages import Message
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import Answer, Refused, Request, Unreachable
from specforge_exp.generation.progress import Progress
from specforge_exp.generation.regenerate import Record
from specforge_exp.generation.run import RateLimit, Regeneration, answer_missing
from specforge_exp.interrupt import Interrupt


def test_no_server_gets_more_than_its_share(tmp_path: Path) -> None:
    store = make_store(tmp_path / "out", write(tmp_path / "a.jsonl", *(str(n) for n in range(50))))
    engine = Instant(servers=2)
    answer_all(store, engine, concurrency=5)
    assert engine.most == 10 and engine.closed
    assert len(merged(store)[0]) == 50


def test_a_run_in_which_nothing_is_answered_ends(tmp_path: Path) -> None:
    """After a hundred failures and not one answer, all kept; the same command goes on."""

    def refused(request: Request) -> Answer:
        raise Refused("it is too long")

    source = write(tmp_path / "a.jsonl", *(str(n) for n in range(250)))
    store = make_store(tmp_path / "out", source, chunk_size=64)
    with pytest.raises(
        InputError,
        match="have all failed, the last one for this: it is too long",
    ):
        answer_all(store, Instant(reply=refused))
    store.close()
    again = make_store(tmp_path / "out", source, chunk_size=64)
    assert 100 <= again.counts.failed < 120
    with pytest.raises(InputError, match="tries 100 more"):
        answer_all(again, Instant(reply=refused))
    again.close()
    again = make_store(tmp_path / "out", source, chunk_size=64)
    assert 200 <= again.counts.failed < 240
    answer_all(again, Instant())
    done, failed = merged(again)
    assert (len(done) + len(failed), again.counts.failed) == (250, len(failed))


@pytest.mark.parametrize(("own", "warned"), [(10, False), (11, True)])
def test_prompts_of_another_length_are_told_at_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, own: int, warned: bool
) -> None:
    """Once, while there is still something to save; `said` has prompts of 10 tokens."""
    asked = []

    def count(record: Record, messages: list[Message]) -> int:
        asked.append(messages)
        return own

    source = write(tmp_path / "a.jsonl", *(str(n) for n in range(40)))
    store = make_store(tmp_path / "out", source)
    with Interrupt() as interrupt:
        progress = Progress(store, interrupt, count=count)
        run = Regeneration(store, Instant(), rules(), RateLimit(None), progress)
        asyncio.run(answer_missing(run, 8, drain=1.0))
    assert caplog.text.count("16 of the first 16 prompts have another number") == warned
    assert len(asked) == 16 and all(len(messages) == 1 for messages in asked)


def test_how_far_it_is_counts_what_this_process_has_done(tmp_path: Path) -> None:
    store = make_store(tmp_path / "out", write(tmp_path / "a.jsonl", *(str(n) for n in range(10))))
    vars(store.counts).update(done=2, failed=1, tokens=100)
    with Interrupt() as interrupt:
        progress = Progress(store, interrupt)
    vars(store.counts).update(done=5, failed=2, tokens=500)
    progress.started -= 100
    progress.write()
    told = json.loads((store.folder / "progress.json").read_text())
    assert (told["done"], told["failed"], told["total"], told["seconds_left"]) == (5, 2, 10, 75)
    assert (told["conversations_per_second"], told["tokens_per_second"]) == (0.04, 4.0)


def test_the_prompt_that_is_compared_is_the_first_that_was_answered(tmp_path: Path) -> None:
    """What no server has counted says nothing."""
    ask, given, said = ({"role": r, "content": "x"} for r in ("user", "assistant", "assistant"))
    talk = [ask, given | {"weight": 0}, ask, said, ask, said]
    asked: list[list[Message]] = []

    def count(record: Record, messages: list[Message]) -> int:
        asked.append(messages)
        return 10

    with Interrupt() as interrupt:
        progress = Progress(make_store(tmp_path / "out", write(tmp_path / "a.jsonl")), interrupt)
    for told in ([10, 30], [0, 0], []):
        progress.compare(count, {"prompt_tokens": told, "conversations": talk})
    progress.compare(count, {"error": "why", "conversations": talk[:1]})
    assert (asked, progress.compared, progress.unlike) == ([talk[:3]], 1, 0)


def test_a_run_in_which_something_is_answered_goes_on(tmp_path: Path) -> None:
    def refused(request: Request) -> Answer:
        if engine.asked[0] is request:
            return said("!")
        raise Refused("it is too long")

    engine = Instant(reply=refused)
    source = write(tmp_path / "a.jsonl", *(str(n) for n in range(150)))
    store = make_store(tmp_path / "out", source, chunk_size=64)
    answer_all(store, engine)
    assert (store.counts.done, store.counts.failed) == (1, 149)


def test_beginnings_stay_on_one_server(tmp_path: Path) -> None:
    """20 beginnings on 3 servers: hardly any is read twice, and everybody works."""
    questions = [f"{n % 20:02d}" * 300 + str(n) for n in range(400)]
    store = make_store(tmp_path / "out", write(tmp_path / "a.jsonl", *questions), chunk_size=64)
    engine = Instant(servers=3)
    answer_all(store, engine, concurrency=4)
    seen = defaultdict(set)
    load = defaultdict(int)
    for request in engine.asked:
        seen[request.messages[0]["content"][:2]].add(request.server)
        load[request.server] += 1
    misses = sum(len(servers) for servers in seen.values())
    assert 400 - misses >= 0.95 * (400 - 20)
    assert min(load.values()) > 400 / 3 / 2


def test_a_long_answer_holds_up_nobody(tmp_path: Path) -> None:
    """The first conversation ends after all others of its server."""
    done = asyncio.Event()

    class Slow(Instant):
        async def answer(self, request: Request) -> Answer:
            first = request.messages[-1]["content"] == "0"
            if first:
                await done.wait()
            answer = await super().answer(request)
            if len(self.asked) == 39 and not first:
                done.set()
            return answer

    store = make_store(tmp_path / "out", write(tmp_path / "a.jsonl", *(str(n) for n in range(40))))
    engine = Slow()
    answer_all(store, engine, concurrency=2)
    assert engine.asked[-1].messages[-1]["content"] == "0"
    assert len(merged(store)[0]) == 40


def test_the_rate_is_bounded(tmp_path: Path) -> None:
    store = make_store(tmp_path / "out", write(tmp_path / "a.jsonl", *(str(n) for n in range(20))))
    began = time.monotonic()
    answer_all(store, Instant(), concurrency=20, rate=100.0)
    assert time.monotonic() - began >= 19 / 100


@pytest.mark.parametrize(("concurrency", "servers"), [(8, 1), (1, 1), (3, 2)])
def test_who_kills_servers_is_found(tmp_path: Path, concurrency: int, servers: int) -> None:
    """Two of forty, or one alone: they fail with the reason, everybody else is answered exactly
    once. The first of two servers cannot be reached."""
    poison = (7, 23) if concurrency > 1 else (7,)

    class Partly(Instant):
        async def answer(self, request: Request) -> Answer:
            if servers > 1 and request.server == 0:
                raise Unreachable("http://one: it cannot be reached")
            return await super().answer(request)

    questions = [f"{'poison ' if n in poison else ''}{n}" for n in range(40)]
    store = make_store(tmp_path / "out", write(tmp_path / "a.jsonl", *questions), chunk_size=9)
    answer_all(store, Partly(servers, poison="poison"), concurrency=concurrency)
    done, failed = merged(store)
    assert [json.loads(line)["id"] for line in failed] == [*map(str, poison)]
    assert all(json.loads(line)["error"] == "the server dies of it" for line in failed)
    assert [int(json.loads(x)["id"]) for x in done] == [n for n in range(40) if n not in poison]


def test_bad_lines_fail_with_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "one", "two")
    path.write_bytes(path.read_bytes() + b"{broken\n" + b"\xff\xfe\n" + path.read_bytes())
    store = make_store(tmp_path / "out", path)
    answer_all(store, Instant())
    done, failed = merged(store)
    assert len(done) == 2 and len(failed) == 4
    assert [json.loads(x)["error"].split()[0] for x in failed] == [
        "a.jsonl:3:", "a.jsonl:4:", "a.jsonl:5:", "a.jsonl:6:",
    ]  # fmt: skip
    assert store.total == 6 == store.counts.done + store.counts.failed


def test_no_server_stops_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    def reply(request: Request) -> Answer:
        if len(engine.asked) > 10:
            raise Unreachable("http://x: it cannot be reached")
        return plain(request)

    path = write(tmp_path / "a.jsonl", *(str(n) for n in range(30)))
    store = make_store(tmp_path / "out", path)
    engine = Instant(reply=reply)
    with pytest.raises(Unreachable, match="cannot be reached"):
        answer_all(store, engine, concurrency=2)
    assert engine.closed and store.counts.done >= 9
    kept = store.counts.done
    store.close()
    again = make_store(tmp_path / "out", path)
    answer_all(again, second := Instant())
    assert len(second.asked) == 30 - kept
    assert len(merged(again)[0]) == 30


def test_the_other_servers_do_the_work_of_one_that_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when they have long ended by the time that one is given up."""

    class Partly(Instant):
        async def answer(self, request: Request) -> Answer:
            if request.server == 1:
                await asyncio.sleep(0.2)
                raise Unreachable("http://two: it cannot be reached")
            return await super().answer(request)

    path = write(tmp_path / "a.jsonl", *(str(n) for n in range(30)))
    store = make_store(tmp_path / "out", path)
    answer_all(store, Partly(servers=3), concurrency=2)
    assert len(merged(store)[0]) == 30
    assert caplog.text.count("the other servers do the work of http://two") == 1


class Signalled(Instant):
    """Once so many are asked there is a signal, which `heard` says was heard; then it answers.

    Args:
        asked: how many.
        heard: whether it was.
    """

    def __init__(self, asked: int, heard: Callable[[], bool]) -> None:
        super().__init__()
        self.least, self.heard = asked, heard

    async def answer(self, request: Request) -> Answer:
        self.asked.append(request)
        if len(self.asked) == self.least:
            os.kill(os.getpid(), signal.SIGTERM)
        while not self.heard():
            await asyncio.sleep(0.01)
        return said("x")


@pytest.mark.parametrize("drain", [60.0, 0.2])
def test_a_signal_lets_answers_end(tmp_path: Path, drain: float) -> None:
    """Within `drain` seconds what is under way is kept; nothing new is begun."""
    path = write(tmp_path / "a.jsonl", *(str(n) for n in range(30)))
    store = make_store(tmp_path / "out", path)
    with Interrupt() as interrupt:
        progress = Progress(store, interrupt)
        engine = Signalled(4, lambda: progress.stopping and drain > 1)
        job = Regeneration(store, engine, rules(), RateLimit(None), progress)
        asyncio.run(answer_missing(job, 4, drain))
        assert interrupt.number == signal.SIGTERM
    assert len(engine.asked) == 4 and engine.closed and progress.in_flight == 0
    assert store.counts.done == (4 if drain > 1 else 0)
    said_so = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert said_so["total"] == 30


def test_signals_are_heard_when_progress_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(progress: Progress) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Progress, "write", full)
    path = write(tmp_path / "a.jsonl", *(str(n) for n in range(8)))
    store = make_store(tmp_path / "out", path)
    with Interrupt() as interrupt:
        progress = Progress(store, interrupt)
        engine = Signalled(2, lambda: progress.stopping)
        job = Regeneration(store, engine, rules(), RateLimit(None), progress)
        asyncio.run(answer_missing(job, 2, 60.0))
    assert len(engine.asked) == 2 and store.counts.done == 2
