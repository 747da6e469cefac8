"""Warm-up, then down, in the shape that was asked for."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specforge_exp.config import TrainerConfig
from specforge_exp.errors import InputError
from specforge_exp.training.schedule import learning_rate

SCHEDULES = st.sampled_from(["cosine", "linear", "constant", "wsd"])


def rates(total: int, cfg: TrainerConfig) -> list[float]:
    return [learning_rate(step, total, 1.0, cfg) for step in range(total + 1)]


@given(SCHEDULES, st.sampled_from(["linear", "cosine"]), st.floats(0, 0.5), st.floats(0, 0.5))
def test_up_and_then_never_up_again(schedule: str, shape: str, warmup: float, floor: float) -> None:
    own: dict[str, Any] = {"decay_shape": shape} if schedule == "wsd" else {}
    cfg = TrainerConfig(schedule=schedule, warmup_ratio=warmup, min_lr_ratio=floor, **own)
    found = rates(100, cfg)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert max(found) == pytest.approx(1)
    assert found[100] == pytest.approx(1 if schedule == "constant" else floor)


@pytest.mark.parametrize("decay", [0.2, 0.0])
@pytest.mark.parametrize(
    ("schedule", "shape", "falls"),
    [
        ("linear", "", "linear"),
        ("cosine", "", "cosine"),
        ("wsd", "linear", "linear"),
        ("wsd", "cosine", "cosine"),
    ],
)
def test_every_rate_is_its_formula(schedule: str, shape: str, falls: str, decay: float) -> None:
    """Of 100 steps: ten of warm-up; wsd falls in the last 20, or not at all."""
    own: dict[str, Any] = {"decay_shape": shape, "decay_ratio": decay} if shape else {}
    cfg = TrainerConfig(schedule=schedule, warmup_ratio=0.1, min_lr_ratio=0.2, **own)
    stays = 100 - 100 * decay if schedule == "wsd" else 10
    for step, rate in enumerate(rates(100, cfg)[:100]):
        done = (step - stays) / (100 - stays) if step > stays else 0.0
        left = 1 - done if falls == "linear" else (1 + math.cos(math.pi * done)) / 2
        assert rate == pytest.approx((step + 1) / 10 if step < 10 else 0.2 + 0.8 * left)
    at_once = TrainerConfig(schedule="linear", warmup_ratio=0.0)
    assert rates(100, at_once)[:3] == pytest.approx([1, 1, 98 / 99])


def test_a_schedule_without_a_stable_part_is_refused() -> None:
    with pytest.raises(InputError, match=r"warmup_ratio=0\.5 and trainer\.decay_ratio=0\.6"):
        TrainerConfig(schedule="wsd", warmup_ratio=0.5, decay_ratio=0.6)
    with pytest.raises(InputError, match=r"trainer\.schedule=cosin.*cosine, linear, constant, wsd"):
        TrainerConfig(schedule="cosin")
