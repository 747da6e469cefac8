"""What a process does that is asked to end."""

import signal

import pytest

from specforge_exp.interrupt import ended_cleanly


class Held:
    """Met by a signal while it goes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_within_a_finaliser_is_not_lost() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with ended_cleanly():
            held = Held()
            del held
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
