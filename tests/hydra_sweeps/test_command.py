"""How a sweep's process is asked to end."""

import signal
import time

import pytest

from hydra_sweeps.command import Terminated, raising_sigterm


class Held:
    """Met by a signal while it goes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_within_a_finaliser_is_not_lost(number: int, raised: type[BaseException]) -> None:
    with pytest.raises(raised), raising_sigterm():
        held = Held(number)
        del held
        time.sleep(30)
