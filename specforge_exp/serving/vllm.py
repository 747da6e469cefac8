"""The options of a vLLM server on its command line."""

from pathlib import Path
from typing import Any

from specforge_exp.serving import sglang

MODULE = "vllm"
"""What its Python has."""
EACH = "per_request_spec_decode_metrics"
"""The option by which every answer says what each of its verifications accepted: 0.32 and later."""
SOURCES = "lib/*/*-packages/vllm/engine/arg_utils.py"
"""Where a Python's vLLM declares its options."""
SIZES = {
    "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens",
    "cpu_offload_gb", "enforce_eager", "disable_log_stats", "uvicorn_log_level",
}  # fmt: skip
"""As of SGLang."""


READING: dict[str, Any] = {}
"""As of SGLang; it reads gpt-oss's channels by itself, others' marks with a parser by name."""


def arguments(model: str, tp_size: int, port: int) -> list[str]:
    """How one is started; it takes its model's name from the path."""
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--tensor-parallel-size", str(tp_size), *where]


def drafting(options: dict[str, Any], folder: str, python: str) -> dict[str, Any]:
    """Its options for a draft: those of the draft's kind, the draft's folder, and EACH but where
    the sources beside `python` are there and lack it."""
    flags: dict[str, Any] = {"speculative_config": options | {"model": folder}}
    sources = Path(python).parent.parent.glob(SOURCES)
    known = all(EACH in file.read_text() for file in sources)
    return flags | {EACH: "detailed"} if known else flags


def flag(key: str, value: Any) -> list[str]:
    """One option: true is the bare flag, false its opposite, which vLLM has for every flag."""
    if value is False:
        return sglang.flag(f"no_{key}", True)
    return sglang.flag(key, value)
