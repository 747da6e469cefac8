"""The options of an SGLang server on its command line."""

import json
from typing import Any

MODULE = "sglang"
"""What its Python has."""
SIZES = {
    "mem_fraction_static", "max_running_requests", "max_queued_requests", "max_total_tokens",
    "chunked_prefill_size", "max_prefill_tokens", "schedule_policy",
    "schedule_conservativeness", "log_level", "enable_metrics",
}  # fmt: skip
"""Options that decide how much fits and what is shown; answers change by their last digits."""


READING = {"reasoning_parser": "auto"}
"""How its server reads answers in which a model marks thoughts and channels by special tokens."""


def arguments(model: str, tp_size: int, port: int) -> list[str]:
    """How one is started."""
    command = ["-m", "sglang.launch_server", "--model-path", model]
    return [*command, "--tp-size", str(tp_size), "--host", "127.0.0.1", "--port", str(port)]


def drafting(options: dict[str, Any], folder: str, python: str) -> dict[str, Any]:
    """Its options for a draft: those of the draft's kind, and the draft's folder."""
    return options | {"speculative_draft_model_path": folder}


def flag(key: str, value: Any) -> list[str]:
    """One option: true is the bare flag, false and null leave it out."""
    if value is None or value is False:
        return []
    name = "--" + key.replace("_", "-")
    if value is True:
        return [name]
    if isinstance(value, dict):
        return [name, json.dumps(value)]
    return [name, *map(str, value if isinstance(value, list) else [value])]
