"""Values, names and whole documents as people read them."""

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

TITLES = {
    "simulated_length": "simulated length", "accepted_length": "accepted length τ",
    "loss": "held-out loss", "alpha/0": "α at step 0", "gpu_hours": "GPU hours", "usd": "USD",
}  # fmt: skip


def title_of(metric: str) -> str:
    """A metric as a heading says it."""
    return TITLES.get(metric, metric)


def shown(value: Any) -> str:
    """A choice as people write it; empty for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | dict):
        return json.dumps(value)
    return str(value)


def measure(value: float | None, digits: int = 4) -> str:
    """A measured number with as many digits as its neighbours have; empty for None."""
    if value is None:
        return ""
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) < 10**digits else f"{value:.0f}"


def interval_text(between: tuple[float, float] | None) -> str:
    """`3.31 to 3.52`; empty for None."""
    return "" if between is None else f"{measure(between[0])} to {measure(between[1])}"


def part(name: str) -> str:
    """A file that lies beside this one."""
    return files("specforge_exp.report").joinpath(name).read_text(encoding="utf-8")


def rendered(name: str, **values: Any) -> str:
    """A template that lies beside this file, with these values; in HTML they are escaped."""
    environment = Environment(
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(part(name)).render(values)
