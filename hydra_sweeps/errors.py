"""What the user can mend."""

from hydra.errors import CompactHydraException


class SweepError(CompactHydraException):
    """The sweeper refuses, or reports failed runs; Hydra prints it without a traceback."""
