"""What answers prompts: the small interface that every engine has, and the ways it may fail."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from specforge_exp.errors import InputError

Message = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; what an engine does not know of these, it must refuse."""

    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """1: off."""
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    """0: off."""
    max_tokens: int = 4096
    """Most new tokens of one answer."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever is said: for measurements."""
    repetition_penalty: float = 1.0
    """What the logit of a token of prompt or answer is divided by, or multiplied with where it is
    negative; 1: off."""
    off: tuple[str, ...] = ()
    """Which of these the model's generation config would switch on: a server must be told."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    messages: list[Message]
    """The conversation so far, as roles and contents."""
    sampling: Sampling
    seed: int = 0
    """Of the samples: the same request with the same seed gets the same answer where the engine
    can promise it."""
    tools: list[Any] | None = None
    """Descriptions of functions, as OpenAI's `tools`."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. enable_thinking."""
    session: str = ""
    """The turns of one conversation: a router keeps them on one worker."""
    special_tokens: bool = False
    """Whether the text is to keep them: where one is a mark that the server has to read, it would
    be left out of what was not read."""
    server: int = 0
    """Which of the engine's servers has the request's beginning in its cache."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    message: Message
    """role assistant, content, and where there are any: reasoning_content, tool_calls."""
    finish_reason: str
    """stop, length or tool_calls."""
    prompt_tokens: int = 0
    """Tokens of the rendered request."""
    completion_tokens: int = 0
    """Tokens generated, the end token included."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already."""


class Refused(Exception):
    """The engine will never answer this request; the message says why."""


class Failed(Exception):
    """This answer did not come, though another attempt may succeed; the message says why."""


class ServerDied(Exception):
    """The engine's own server ended while requests were under way."""


class Unreachable(InputError):
    """No server has answered for as long as engine.patience; what is done is kept."""


class Engine(Protocol):
    """Answers requests; one object for a whole run, used by one event loop."""

    @property
    def servers(self) -> int:
        """How many servers it has; each takes engine.concurrency requests at a time."""

    async def answer(self, request: Request) -> Answer:
        """The answer; any number may be under way.

        Raises:
            Refused, Unrenderable: this request will not be answered.
            Failed: it was not answered, retries included.
            ServerDied: the engine's own server ended; the next request starts it again.
            Unreachable: there is no server, or it stays too busy.
        """

    async def close(self) -> None:
        """Give back what the engine holds; nothing is left running."""
