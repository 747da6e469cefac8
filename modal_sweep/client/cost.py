"""What a job costs: a dated table of list prices, times expected hours or the timeout."""

from typing import Any

from modal_sweep.client.settings import gpu_list, type_and_count
from modal_sweep.config import JobSettings
from modal_sweep.errors import LaunchError

PRICES_DATE = "2026-06-27"
# USD per hour, Modal's list prices of that day; cpu is a physical core, memory a GiB.
PRICES = {
    "T4": 0.5904,
    "L4": 0.7992,
    "A10": 1.1016,
    "A10G": 1.1016,
    "L40S": 1.9512,
    "A100": 2.0988,
    "A100-40GB": 2.0988,
    "A100-80GB": 2.4984,
    "RTX-PRO-6000": 3.0312,
    "H100": 3.9492,
    "H200": 4.5396,
    "B200": 6.2496,
    "cpu": 0.0472,
    "memory": 0.008,
}
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
