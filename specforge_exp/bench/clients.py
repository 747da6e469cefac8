"""One prompt, asked of a server that speculates, with the counts of its verifications.

SGLang is asked through its own /generate, which counts for every request. Others through
/v1/completions; vLLM counts for every request where it was started with
--per-request-spec-decode-metrics, else in /metrics, for all together, so only one may be under way.
Both take token ids and give them back, so that answers can be compared token for token. What a
model's generation config says of sampling is told off: the answers are to be those of bench's own
options, on every engine.
"""

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import orjson

from specforge_exp.bench.speculative import Decoding, Generation
from specforge_exp.errors import InputError
from specforge_exp.serving.server import proxy_of

JSON = {"Content-Type": "application/json"}
PLAIN: dict[str, Any] = {
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
"""Nothing but the temperature: a server would add what the model's generation config says."""
COUNTER = re.compile(r"^vllm:(?:spec_decode_num_)?(\w+?)(?:_total)?\{(.*)\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class ServedAnswer:
    """What came back."""

    generation: Generation
    verified: int
    """Verifications that the server counted; 0: it did not speculate, or does not say."""


Client = Callable[[list[int], Decoding], Awaitable[ServedAnswer]]
"""Asks for the answer to a prompt; raises InputError when the server refuses or fails."""


@dataclass
class AnswerStream:
    """An answer while it comes."""

    began: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """Tokens of each piece after the first one."""

    def add(self, tokens: list[int], whole: bool) -> None:
        """Take a piece, or the whole answer so far."""
        new = tokens[len(self.tokens) :] if whole else tokens
        if not new:
            return
        if not self.tokens:
            self.first = time.perf_counter() - self.began
        # The prompt's forward gives one token; what came with it is the first verification's.
        if step := len(new) - (not self.tokens):
            self.steps.append(step)
        self.tokens += new

    def end(
        self, verified: int, accepted: list[int] | None, in_order: bool = False
    ) -> ServedAnswer:
        """The answer, with the server's counts.

        Args:
            verified: verifications.
            accepted: drafted tokens that each of them kept; None: not known.
            in_order: whether `accepted` is in the order of the verifications.

        What the verifications gained adds up to the tokens after the first one. A piece of the
        stream may hold several of them, so pieces say what each gained only where there are as
        many; what the last one kept beyond the end of the answer they never say.
        """
        seconds = time.perf_counter() - self.began
        gained = self.steps if len(self.steps) == verified else []
        if accepted is not None:
            gained = cut([number + 1 for number in accepted], self.steps, in_order)
        generation = Generation(self.tokens, seconds, gained, accepted or [], self.first)
        return ServedAnswer(generation, verified)


def cut(yielded: list[int], steps: list[int], in_order: bool) -> list[int]:
    """What verifications that yielded so many tokens added to an answer that came in `steps`.

    It ended within the last of them. Which one that is follows from their order; without it, from a
    stream whose pieces are the verifications one by one, or where only one number is large enough.
    Empty where nothing says it, or where the counts are no such answer's.
    """
    gained, excess = yielded[::-1], sum(yielded) - sum(steps)
    if excess <= 0:
        return [] if excess else yielded
    if not in_order and sorted([*steps[:-1], sum(steps[-1:], excess)]) == sorted(yielded):
        return steps
    ends = {n for n in (gained[:1] if in_order else gained) if n > excess}
    if len(ends) != 1:
        return []
    gained[gained.index(ends.pop())] -= excess
    return gained[::-1]


def seeded(name: str, decoding: Decoding) -> dict[str, int]:
    """The seed of samples, by the server's name of it; a greedy answer needs none."""
    return {name: decoding.seed} if decoding.temperature else {}


async def pieces(
    http: aiohttp.ClientSession, url: str, body: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed answer; raises InputError for what is none."""
    try:
        proxy = proxy_of(url)
        async with http.post(url, data=orjson.dumps(body), headers=JSON, proxy=proxy) as response:
            if response.status != 200:
                complaint = " ".join((await response.text()).split())[:300]
                raise InputError(f"{url}: HTTP {response.status}: {complaint}")
            async for line in response.content:
                text = line.strip().removeprefix(b"data:").strip()
                if text and text != b"[DONE]":
                    event = orjson.loads(text)
                    if error := event.get("error"):
                        raise InputError(f"{url}: {error}")
                    yield event
    except (aiohttp.ClientError, OSError) as error:
        raise InputError(f"{url} did not answer ({type(error).__name__}: {error})") from None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{url}: the answer is no stream of JSON ({error})") from None


def sglang(http: aiohttp.ClientSession, root: str) -> Client:
    """A client of SGLang's own interface."""

    async def ask(prompt: list[int], decoding: Decoding) -> ServedAnswer:
        body = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": decoding.temperature,
                "max_new_tokens": decoding.max_tokens,
                "stop_token_ids": sorted(decoding.eos),
                **PLAIN,
                **seeded("sampling_seed", decoding),
            },
            "stream": True,
        }
        progress, meta = AnswerStream(), {}
        async for event in pieces(http, f"{root}/generate", body):
            if "output_ids" not in event:
                raise InputError(f"{root}/generate gives no output_ids; SGLang 0.5 and later do")
            meta, tokens = event["meta_info"], event["output_ids"]
            # Depending on the server's options a piece is new, or the whole answer so far.
            progress.add(tokens, whole=len(tokens) == meta["completion_tokens"])
        reason = meta.get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise InputError(f"{root} broke an answer off: {reason.get('message', reason)}")
        histogram = meta.get("spec_correct_drafts_histogram", meta.get("spec_accept_histogram"))
        accepted = None if histogram is None else spelled_out(histogram)
        return progress.end(int(meta.get("spec_verify_ct") or 0), accepted)

    return ask


def openai(http: aiohttp.ClientSession, root: str, model: str, several: bool) -> Client:
    """A client of OpenAI's completions; counts are vLLM's, where it has them.

    Args:
        http: the connections.
        root: where it listens.
        model: its name there.
        several: whether several prompts are under way, so that /metrics tells nothing of one.
    """

    async def ask(prompt: list[int], decoding: Decoding) -> ServedAnswer:
        body = {
            "model": model, "prompt": prompt, "stream": True, "return_token_ids": True,
            "temperature": decoding.temperature, "max_tokens": decoding.max_tokens,
            "stop_token_ids": sorted(decoding.eos), "stream_options": {"include_usage": True},
            **PLAIN, **seeded("seed", decoding),
        }  # fmt: skip
        before = await counters(http, root)
        progress, speculation = AnswerStream(), None
        async for event in pieces(http, f"{root}/v1/completions", body):
            speculation = (event.get("metrics") or {}).get("speculative_decoding") or speculation
            for choice in event.get("choices", []):
                tokens = choice.get("token_ids")
                if tokens is None and choice.get("text"):
                    raise InputError(
                        f"{root}/v1/completions gives no token_ids, which tell how many tokens "
                        "came at once; vLLM 0.10.2 and later do, and SGLang through its /generate"
                    )
                progress.add(tokens or [], whole=False)
        if speculation:
            in_order = speculation.get("per_step_accepted")
            accepted = in_order or spelled_out(speculation["acceptance_histogram"])
            return progress.end(int(speculation["num_spec_steps"]), accepted, bool(in_order))
        after = await counters(http, root)
        grown = {name: after[name] - before.get(name, 0.0) for name in after}
        own = len(progress.tokens)
        if grown.get("drafts") and (several or grown.get("generation_tokens", own) != own):
            raise InputError(
                f"{root} counts the verifications of all requests together, and others were under "
                "way: start it with --per-request-spec-decode-metrics detailed (vLLM "
                "0.32 and later), or give bench.concurrency=1 and let nobody else ask"
            )
        return progress.end(int(grown.get("drafts", 0)), accepted_of(grown))

    return ask


async def counters(http: aiohttp.ClientSession, root: str) -> dict[str, float]:
    """vLLM's counts so far, by name (without `spec_decode_num_`) and position; empty for other
    servers."""
    try:
        async with http.get(f"{root}/metrics", proxy=proxy_of(root)) as response:
            text = await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, OSError):
        return {}
    counts: dict[str, float] = {}
    for name, labels, value in COUNTER.findall(text):
        position = re.search(r'position="(\d+)"', labels)
        key = f"{name}/{position[1]}" if position else name
        counts[key] = counts.get(key, 0.0) + float(value)
    return counts


def accepted_of(grown: dict[str, float]) -> list[int] | None:
    """Drafted tokens that each verification kept, from how often each position was kept."""
    prefix = "accepted_tokens_per_pos/"
    positions = sorted(int(k.removeprefix(prefix)) for k in grown if k.startswith(prefix))
    if not positions:
        return None
    at_least = [grown["drafts"], *(grown[f"{prefix}{position}"] for position in positions), 0]
    return spelled_out([int(more) - int(fewer) for more, fewer in pairwise(at_least)])


def spelled_out(histogram: Sequence[int]) -> list[int]:
    """Every number as often as the histogram counts it."""
    return [number for number, count in enumerate(histogram) for _ in range(int(count))]


async def client_of(
    http: aiohttp.ClientSession, url: str, model: str | None, several: bool
) -> Client:
    """The client for the server at `url`, with or without /v1: SGLang's, or OpenAI's.

    Args:
        http: the connections.
        url: where it listens.
        model: its name there; None: the only one.
        several: whether several prompts will be under way.

    Raises:
        InputError: it cannot be reached, or serves several models and `model` names none.
    """
    root = url.rstrip("/").removesuffix("/v1")
    for page in ("model_info", "get_model_info"):
        if await fetch(http, f"{root}/{page}") is not None:
            return sglang(http, root)
    name = await served_model(http, f"{root}/v1", model)
    return openai(http, root, name, several)


async def served_model(http: aiohttp.ClientSession, url: str, model: str | None) -> str:
    """`model`, or the only one that an OpenAI-compatible server lists.

    Raises:
        InputError: it cannot be reached, or `model` is None and it lists several or none.
    """
    listed = await fetch(http, f"{url}/models")
    if listed is None:
        raise InputError(f"{url}/models is no list as OpenAI's and SGLang's servers have one")
    names = [str(model_record.get("id")) for model_record in listed.get("data", [])]
    if model is None and len(names) != 1:
        raise InputError(f"{url} serves {names}; choose one with engine.served_name")
    return model or names[0]


async def fetch(http: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    """A JSON page; None where there is none.

    Raises:
        InputError: nothing answers there.
    """
    try:
        async with http.get(url, proxy=proxy_of(url)) as response:
            content = orjson.loads(await response.read()) if response.status == 200 else None
            return content if isinstance(content, dict) else None
    except (aiohttp.ClientError, OSError) as error:
        raise InputError(f"{url} cannot be reached ({type(error).__name__}: {error})") from None
    except ValueError:
        return None
