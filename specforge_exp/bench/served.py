"""Answers by servers: one with the draft, then one of the target alone, on the same prompts.

engine=sglang and engine=vllm start them one after the other on the same GPUs and end them with
everything that they have started. engine=openai asks servers that run already.
"""

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from specforge_exp import paths
from specforge_exp.bench import clients
from specforge_exp.bench.acceptance import PairedAnswer, overlap
from specforge_exp.bench.asking import Asking, SetAnswers, Talk
from specforge_exp.bench.clients import Client
from specforge_exp.config import Config, locate
from specforge_exp.config.machine import script
from specforge_exp.data.chat import Message
from specforge_exp.drafts.speculators import in_speculators_layout
from specforge_exp.errors import InputError
from specforge_exp.serving.command import Speculation, check_installed
from specforge_exp.serving.downloads import download
from specforge_exp.serving.gpus import make_servers, visible_gpus
from specforge_exp.serving.server import Server, connections

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exchange:
    """A prompt, and what came back."""

    prompt: list[int]
    answer: clients.ServedAnswer


Answers = tuple[list[list[Exchange]], float]
"""By conversation and turn, and the seconds that all took together."""
Converse = Callable[[], Awaitable[list[Exchange]]]
"""Carries out a conversation."""


def answer(cfg: Config, asking: Asking, sets: dict[str, list[Talk]]) -> dict[str, SetAnswers]:
    """As `asking.BenchEngine`."""
    return asyncio.run(answer_sets(cfg, asking, sets))


async def answer_sets(
    cfg: Config, asking: Asking, sets: dict[str, list[Talk]]
) -> dict[str, SetAnswers]:
    """Everything with the draft; then the prompts that this has led to, alone."""
    size, drafted = cfg.bench.concurrency, dict[str, Answers]()
    first = [asking.encode(talk.asks[0], talk.tools) for talk in next(iter(sets.values()))[:size]]

    async def warm_up(client: Client) -> None:
        await asyncio.gather(*(client(prompt, asking.decoding) for prompt in first))

    async with serving(cfg, alone=False) as client:
        await warm_up(client)
        for name, conversations in sets.items():
            jobs = [
                partial(converse, client, asking, talk, f"{name}/{number}")
                for number, talk in enumerate(conversations)
            ]
            drafted[name] = await carry_out(f"bench {name}", jobs, size)
            check_speculated(cfg, name, drafted[name][0])
    alone: dict[str, Answers] = {}
    if cfg.bench_alone:
        async with serving(cfg, alone=True) as client:
            await warm_up(client)
            for name, (exchanges, _) in drafted.items():
                jobs = [
                    partial(repeat, client, asking, turns, f"{name}/{number}")
                    for number, turns in enumerate(exchanges)
                ]
                alone[name] = await carry_out(f"bench {name}, alone", jobs, size)
    return {
        name: together(exchanges, alone.get(name), asking) for name, exchanges in drafted.items()
    }


@asynccontextmanager
async def serving(cfg: Config, alone: bool) -> AsyncIterator[Client]:
    """The client of a server with the draft, or of one without; one that is started here ends.

    Raises:
        InputError: there is no server, or it does not start; with the end of its log.
    """
    options, several = cfg.engine, cfg.bench.concurrency > 1
    key = os.environ.get(options.api_key) if options.name == "openai" else None
    async with connections(options.timeout, key) as http:
        if options.name == "openai":
            if len(options.urls) > 1:
                raise InputError(
                    f"bench measures one server, engine.urls has {len(options.urls)}: give the one "
                    "with the draft, and in bench.alone_url one without"
                )
            url = cfg.bench.alone_url if alone else options.urls[0]
            yield await clients.client_of(http, str(url), options.served_name, several)
            return
        folder = Path(tempfile.mkdtemp(prefix="specforge-bench-"))
        server = server_of(cfg, alone, folder)
        log.info("bench: the server starts; its log: %s", server.log)
        try:
            await server.start(options.startup_timeout)
            yield await clients.client_of(http, server.url, None, several)
        except InputError as error:
            if "the end of" in str(error) or not server.log.exists():
                raise
            raise InputError(f"{error}; {server.tail()}") from None
        finally:
            await server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def server_of(cfg: Config, alone: bool, folder: Path) -> Server:
    """A server on this machine's first GPUs that has not been started."""
    check_installed(cfg.engine)
    if not Path(cfg.model.path).is_dir() and not cfg.engine.command:
        download(cfg.model.path)
    draft = None
    if cfg.engine.name == "vllm" and cfg.bench.temperature and not alone and not visible_gpus():
        log.warning(
            "bench: vLLM 0.32 on a CPU loses the temperature of drafted tokens, of any draft: "
            "what it samples, and its counts, are not the target's; bench.temperature=0 is right"
        )
    if not alone:
        kind, length = locate(cfg.draft._target_), cfg.chain_length
        of_kind = kind.vllm_options if cfg.engine.name == "vllm" else kind.sglang_options
        options = of_kind(length)
        if not options:
            raise InputError(
                f"engine={cfg.engine.name} does not serve draft={cfg.draft.name}; bench it with "
                "another engine (vllm, sglang) or in this process: engine=transformers"
            )
        if cfg.engine.name == "sglang" and in_speculators_layout(paths.export_dir(cfg)):
            raise InputError(
                f"{paths.export_dir(cfg)} is in speculators' format, which SGLang does not read; "
                f"{script('export')} export.format=sglang export.force=true"
            )
        draft = Speculation(str(paths.export_dir(cfg).resolve()), options)
    return make_servers(cfg, folder, draft)[0]


async def converse(client: Client, asking: Asking, talk: Talk, name: str) -> list[Exchange]:
    """Ask the turns of the conversation `name`, each after the answer to the one before.

    Ends before a turn for which there is no room.
    """
    turns: list[Exchange] = []
    messages: list[Message] = []
    for ask in talk.asks:
        prompt = asking.encode(messages := [*messages, *ask], talk.tools)
        if not 0 < len(prompt) <= asking.room:
            break
        decoding = asking.sampled(f"{name}/{len(turns)}")
        turns.append(Exchange(prompt, await client(prompt, decoding)))
        text = asking.decode(turns[-1].answer.generation.tokens)
        messages.append({"role": "assistant", "content": text})
    return turns


async def repeat(
    client: Client, asking: Asking, turns: list[Exchange], name: str
) -> list[Exchange]:
    """Ask the prompts of the conversation `name` again, in turn; its samples are other ones."""
    again = [asking.sampled(f"{name}/{number}/alone") for number in range(len(turns))]
    pairs = zip(turns, again, strict=True)
    return [Exchange(turn.prompt, await client(turn.prompt, own)) for turn, own in pairs]


async def carry_out(title: str, conversations: Sequence[Converse], size: int) -> Answers:
    """Carry out conversations, `size` at a time."""
    exchanges: list[list[Exchange]] = [[] for _ in conversations]
    waiting = iter(enumerate(conversations))
    with tqdm(total=len(conversations), desc=title, unit="prompt", disable=None) as bar:

        async def asker() -> None:
            for number, carry_on in waiting:
                exchanges[number] = await carry_on()
                bar.update()

        began = time.perf_counter()
        askers = [asyncio.create_task(asker()) for _ in range(size)]
        try:
            await asyncio.gather(*askers)
        finally:
            for task in askers:
                task.cancel()
        return exchanges, time.perf_counter() - began


def check_speculated(cfg: Config, name: str, conversations: list[list[Exchange]]) -> None:
    """Raise InputError when no answer of a data set took a verification, one kept more drafted
    tokens than bench counts, or bench.average needs to know how many and the server does not say.
    """
    answers = [exchange.answer for turns in conversations for exchange in turns]
    kept = [n for a in answers for n in a.generation.accepted]
    kept += [n - 1 for a in answers for n in a.generation.gained]
    if max(kept, default=0) > cfg.chain_length:
        raise InputError(
            f"bench {name}: the server kept {max(kept)} drafted tokens of one verification, so it "
            f"drafts more than bench.chain_length={cfg.chain_length}: give the number it was "
            "started with"
        )
    silent = sum(a.verified > 0 and not a.generation.accepted for a in answers)
    if silent and cfg.bench.average == "responses":
        raise InputError(
            f"bench {name}: bench.average=responses needs to know how many drafted tokens each "
            f"verification kept, which the server does not say of {silent} of {len(answers)} "
            "answers; bench.average=conversations needs their number alone"
        )
    if any(a.verified for a in answers) or all(len(a.generation.tokens) < 2 for a in answers):
        return
    where = cfg.engine.urls[0] if cfg.engine.name == "openai" else "the server"
    raise InputError(
        f"bench {name}: {where} never speculated, or does not count it: neither spec_verify_ct in "
        "/generate nor vLLM's counts of speculation have grown; is it started with the draft?"
    )


def together(drafted: Answers, alone: Answers | None, asking: Asking) -> SetAnswers:
    """Both ways of answering the same prompts."""
    requests = []
    for number, turns in enumerate(drafted[0]):
        for turn, exchange in enumerate(turns):
            ours, verified = exchange.answer.generation, exchange.answer.verified
            single = alone[0][number][turn].answer.generation if alone else None
            novelty = overlap((single or ours).tokens, asking.training_keys)
            requests.append(PairedAnswer(ours, single, novelty, turn > 0, verified))
    return SetAnswers(requests, drafted[1], alone[1] if alone else None)
