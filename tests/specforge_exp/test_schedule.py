"""Warm-up, then down, in the shape that was asked for."""

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
    cfg = TrainerConfig(
        schedule=schedule, decay_shape=shape, warmup_ratio=warmup, min_lr_ratio=floor
    )
    found = rates(100, cfg)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert max(found) == pytest.approx(1)
    assert found[100] == pytest.approx(1 if schedule == "constant" else floor)


def test_cosine_and_linear_at_half_way() -> None:
    for schedule in ("cosine", "linear"):
        cfg = TrainerConfig(schedule=schedule, warmup_ratio=0.0, min_lr_ratio=0.2)
        assert learning_rate(50, 99, 1.0, cfg) == pytest.approx(0.6)
    quarter = TrainerConfig(schedule="cosine", warmup_ratio=0.0)
    assert learning_rate(25 + 1, 101, 1.0, quarter) == pytest.approx(0.8535533905932737)


def test_wsd_stays_and_then_falls() -> None:
    cfg = TrainerConfig(schedule="wsd", warmup_ratio=0.1, decay_ratio=0.2, min_lr_ratio=0.1)
    found = rates(100, cfg)
    assert found[0] == pytest.approx(0.1)
    assert found[9:81] == pytest.approx([1.0] * 72)
    assert found[90] == pytest.approx(0.55)
    assert found[100] == pytest.approx(0.1)


def test_a_schedule_without_a_stable_part_is_refused() -> None:
    with pytest.raises(InputError, match=r"warmup_ratio=0\.5 and trainer\.decay_ratio=0\.6"):
        TrainerConfig(schedule="wsd", warmup_ratio=0.5, decay_ratio=0.6)
    with pytest.raises(InputError, match=r"trainer\.schedule=cosin.*cosine, linear, constant, wsd"):
        TrainerConfig(schedule="cosin")
