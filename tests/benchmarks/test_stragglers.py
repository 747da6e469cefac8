"""Jobs that take unequally long keep no worker waiting."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stragglers
from hydra.core.global_hydra import GlobalHydra


@pytest.fixture(autouse=True)
def fresh_hydra(hydra_restore_singletons: Any) -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def test_the_clock(tmp_path: Path) -> None:
    """One straggler among six jobs of two workers: the others run beside it."""
    seconds = [5.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert stragglers.makespan("optuna", seconds, 2, tmp_path / "stock") == 7.0
    assert stragglers.makespan("optuna_async", seconds, 2, tmp_path / "ours") == 5.0


def test_makespan_beside_the_stock_sweeper() -> None:
    found = stragglers.compare(seeds=6, trials=24, workers=4)
    assert found["ratio"] <= 0.75, found
