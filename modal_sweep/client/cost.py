"""What a job costs: a dated table of list prices, times expected hours or the timeout."""

import json
from pathlib import Path
from typing import Any

from modal_sweep.client.settings import gpu_list, type_and_count
from modal_sweep.config import JobSettings
from modal_sweep.errors import LaunchError

LIST: dict[str, Any] = json.loads(Path(__file__).with_name("prices.json").read_text())
"""Modal's list prices of one day; cpu is a physical core, memory a GiB."""
PRICES_DATE: str = LIST["date"]
PRICES: dict[str, float] = LIST["usd_per_hour"]
# What Modal gives a function that asks for nothing.
LEAST_CORES, LEAST_GIB = 0.125, 0.125


def options_per_hour(options: dict[str, Any], overrides: dict[str, float]) -> float:
    """Price of a job's container by a plan's options; with a list of GPUs, of the dearest.

    Raises:
        LaunchError: for a GPU without a price.
    """
    table = PRICES | overrides | {name.upper(): price for name, price in overrides.items()}
    gpus = []
    for gpu in options["gpus"]:
        kind, count = type_and_count(gpu)
        if kind not in table:
            raise LaunchError(
                f"no price is known for gpu={gpu}; give it in USD per hour: "
                f"+hydra.launcher.prices.{kind}=..."
            )
        gpus.append(table[kind] * count)
    cores = max(options["cpu"] or 0, LEAST_CORES)
    gib = max((options["memory"] or 0) / 1024, LEAST_GIB)
    return max(gpus, default=0.0) + cores * table["cpu"] + gib * table["memory"]


def estimate(settings: JobSettings, overrides: dict[str, float]) -> tuple[float | None, float]:
    """Expected cost (None when `hours` is not given) and the most that one attempt costs."""
    options = {"gpus": gpu_list(settings.gpu), "cpu": settings.cpu, "memory": settings.memory}
    rate = options_per_hour(options, overrides)
    expected = None if settings.hours is None else rate * settings.hours
    return expected, rate * settings.timeout / 3600
