"""The options of a vLLM server on its command line."""

from typing import Any

from specforge_exp.serving import sglang

MODULE = "vllm"
"""What its Python has."""
SIZES = {
    "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens",
    "cpu_offload_gb", "enforce_eager", "disable_log_stats", "uvicorn_log_level",
}  # fmt: skip
"""As of SGLang."""


def arguments(model: str, tp_size: int, port: int) -> list[str]:
    """How one is started; it takes its model's name from the path."""
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--tensor-parallel-size", str(tp_size), *where]


def drafting(options: dict[str, Any], folder: str) -> dict[str, Any]:
    """Its options for a draft: those of the draft's kind, the draft's folder, and that every answer
    says what each of its verifications accepted (vLLM 0.32 and later)."""
    return {
        "speculative_config": options | {"model": folder},
        "per_request_spec_decode_metrics": "detailed",
    }


def flag(key: str, value: Any) -> list[str]:
    """One option: true is the bare flag, false its opposite, which vLLM has for every flag."""
    if value is False:
        return sglang.flag(f"no_{key}", True)
    return sglang.flag(key, value)
