"""What both ends call the same on Modal, and the versions they must agree on."""

import sys
from functools import cache
from importlib.metadata import version

MOUNT = "/mnt/hydra-sweeps"
"""Where a container has the folder of its sweep."""
COMMON_DICT = "hydra-modal-launcher-common"
"""By hash, what all jobs of a launch share."""
# What unpickles the configuration must be what pickled it.
PINNED = ("hydra-core", "omegaconf", "cloudpickle")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def status_dict(claims: str) -> str:
    """Name of the Dict that says what a sweep's running jobs do."""
    return f"{claims}-running"


@cache
def versions() -> dict[str, str]:
    """What launcher and worker must agree on."""
    return {"python": PYTHON, **{name: version(name) for name in PINNED}}
