"""What serves the target."""

from dataclasses import dataclass, field
from typing import Any

from specforge_exp.config.checks import above_zero, allow, minimums
from specforge_exp.errors import InputError


@dataclass
class EngineConfig:
    """What serves the target while it answers the prompts."""

    name: str = "transformers"
    """transformers: in this process; openai: servers that run already; sglang, vllm: servers that
    are started on this machine's GPUs; modal: in containers that Modal starts as needed."""
    server: str = "sglang"
    """modal: what its containers start, sglang or vllm."""
    concurrency: int = 64
    """Conversations under way at a time, per server."""
    urls: list[str] = field(default_factory=list)
    """openai: base URLs of the servers, e.g. http://127.0.0.1:30000/v1."""
    served_name: str | None = None
    """openai: the model's name there; null: the only one that /models lists."""
    api_key: str = "OPENAI_API_KEY"
    """openai: the environment variable with the key; it may be unset."""
    tp_size: int | None = None
    """sglang, vllm, modal: GPUs of one server; null: 1 for targets of up to 9 billion
    parameters, 2 up to 35, 8 above."""
    num_servers: int | None = None
    """sglang, vllm: servers on this machine; null: as many as its GPUs carry. modal: containers at
    a time, at most; null: as many as Modal gives."""
    command: list[str] = field(default_factory=list)
    """sglang, vllm, modal: starts another server than those; {model}, {port} and {tp_size} are
    filled in, for bench also {draft} (empty for the target alone). It needs /health and
    /v1/chat/completions; for bench SGLang's /generate."""
    python: str | None = None
    """sglang, vllm: the Python that has the server, whose versions differ from those of training;
    null: this one."""
    args: dict[str, Any] = field(default_factory=dict)
    """sglang, vllm, modal: more of the server's options, e.g. mem_fraction_static: 0.85."""
    port: int = 30000
    """sglang, vllm: the first server's port; the others follow."""
    gpu: str = "H100"
    """modal: the kind of GPU."""
    usd_per_gpu_hour: float = 0.0
    """modal: price, for the account of the cost."""
    image: str = "lmsysorg/sglang:v0.5.21"
    """modal: the containers' image; `debian_slim` with `command` is one without any server."""
    startup_timeout: float = 1200.0
    """Seconds until a server must be healthy."""
    timeout: float = 600.0
    """Seconds for one answer."""
    retries: int = 4
    """Further attempts at an answer that failed or timed out."""
    patience: float = 600.0
    """Seconds to wait for servers that refuse connections or are too busy (429, 502, 503, 504); at
    most 10 for one that has never answered."""
    rate_limit: float | None = None
    """Conversations (modal: inputs, which are chunks of them) begun per second, at most; null: no
    limit."""

    def __post_init__(self) -> None:
        allow(self, "engine.", name="transformers openai sglang vllm modal")
        allow(self, "engine.", server="sglang vllm")
        minimums(
            self, "engine.", concurrency=1, retries=0, tp_size=1, num_servers=1, port=1,
            usd_per_gpu_hour=0,
        )  # fmt: skip
        above_zero(self, "engine.", "startup_timeout timeout patience rate_limit")
        if self.name == "openai" and not self.urls:
            raise InputError(
                "engine=openai needs engine.urls=[http://127.0.0.1:30000/v1]: where the servers are"
            )
        if self.urls and self.name != "openai":
            raise InputError(f"engine.urls is for engine=openai, not for engine.name={self.name}")

    @property
    def server_name(self) -> str:
        """The server that this engine starts."""
        return self.server if self.name == "modal" else self.name
