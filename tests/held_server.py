"""The server of specforge_exp.generation.local, whose answers get no longer while a file is there.

    python tests/held_server.py FILE [the server's options]

Whoever asks is taken in meanwhile, and sent away, and missed when they leave.
"""

import os
import sys
import time

from specforge_exp.generation.local import serve, transformers_engine
from specforge_exp.generation.local.batcher import Batcher

HOLD = sys.argv.pop(1)


class HeldBatcher(Batcher):
    """Takes no step while the file is there."""

    def _step(self) -> None:
        if os.path.exists(HOLD):
            time.sleep(0.01)
        else:
            super()._step()


transformers_engine.Batcher = HeldBatcher  # type: ignore[misc]
serve.main()
